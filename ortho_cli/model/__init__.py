"""A language model in memory: loading, text, secrets, blocks, hooks and scores."""
