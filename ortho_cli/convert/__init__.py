"""The command `ortho convert`: any checkpoint, or an artifact, to a plain checkpoint."""
