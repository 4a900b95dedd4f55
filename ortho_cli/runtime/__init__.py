"""The runtime: OrthoLinear, its product and kernels, Engine and load."""
