"""Faster twins of the operations for GPUs, in Triton."""
