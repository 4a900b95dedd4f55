"""The sources of `ortho convert`: one file for each foreign format."""
