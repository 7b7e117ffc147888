"""The GPU executor: torch tensors, Triton kernels, CUDA graphs."""
