"""Backends: each is a tuple of KernelSpec, the fastest first. KERNELS is all of them, the generic ones last."""

from . import cpu, torch

KERNELS = (*cpu.KERNELS, *torch.KERNELS)
