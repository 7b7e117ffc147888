"""Kernels of the CUDA executor, in the Triton language. See docs/cuda-kernels.md."""
