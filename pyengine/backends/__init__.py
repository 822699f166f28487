"""Backends: each is a tuple of KernelSpec, the fastest first. KERNELS is all, the generic last."""

from . import cpu, torch, triton

KERNELS = (*cpu.KERNELS, *triton.KERNELS, *torch.KERNELS)
