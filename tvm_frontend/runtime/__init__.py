"""Runs compiled models: sessions on a CPU and on a GPU, the CUDA graph of a step, and the threads of kernels."""
