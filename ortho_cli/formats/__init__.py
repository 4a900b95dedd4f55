"""The formats of base, ortho and statistics: how each is opened, read and verified."""
