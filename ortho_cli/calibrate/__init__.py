"""The command `ortho calibrate`: curvature statistics of a model over sets of text."""
