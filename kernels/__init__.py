"""Triton kernels of pyengine. None yet: linear is issue 3 of the project, the rest follows."""
