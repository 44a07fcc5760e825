"""Benchmarks of the kernels: the compiler's output, correctness and speed on a device."""
