"""Triton kernels; see README.md in this folder. Nothing here is imported before a GPU asks for it."""
