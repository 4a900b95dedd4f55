"""One weight into base and ortho: the mathematics, the kernels and the loop over tiles."""
