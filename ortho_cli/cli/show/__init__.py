"""Output for people: tables, progress and notes; only this room imports rich."""
