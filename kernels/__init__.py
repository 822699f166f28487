"""Triton kernels. None yet; see README.md in this folder."""
