"""Forgetting: changes codes of base so that base alone does not know a forget set."""
