"""The demonstration: trains a small model with secrets and takes it through every command."""
