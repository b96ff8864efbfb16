"""Faster twins of the operations for CPUs, in C++ (`native/`) or by PyTorch's oneDNN."""
