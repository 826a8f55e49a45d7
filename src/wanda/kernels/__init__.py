"""C kernels and what stands in for them where they are not built."""
