"""The compiled kernels: found, loaded and described; and the memory that feature maps lie in."""
