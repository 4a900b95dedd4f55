"""The version of the package: in every artifact, and what `ortho --version` prints."""

__version__ = "0.1.0"
