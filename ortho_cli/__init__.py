"""Offline checkpoint decomposition: a dense INT4 base and a sparse high-precision ortho stream."""

__version__ = "0.1.0"
