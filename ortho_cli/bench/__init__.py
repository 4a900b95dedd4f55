"""The command `ortho bench`: figures, attacks, baselines and the verdict."""
