"""What a bug report or a measurement has to say about the machine and the software it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import _C
from ._version import __version__
from .backends import KERNELS, cpu, triton
from .formats import ACTIVATIONS, FLOAT, FORMATS
from .registry import Problem, choose

# Packages whose version is told if they are installed.
PACKAGES = ("safetensors", "rich", "triton", "transformers", "sentence-transformers", "matplotlib")

# What inference kernels of this field are written for; the names are those of /proc/cpuinfo.
CPU_FLAGS = (
    *("sse4_1", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx_vnni_int8"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)


def environment() -> dict[str, Any]:
    """What `pyengine env` shows. Holds no path, no user and no host name."""
    return {
        "pyengine": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "os": os_name(),
        "packages": _installed(PACKAGES),
        "cpu": cpu_model(),
        "cores": cores(),
        "features": cpu_features(),
        "isa": cpu.ALLOWED_ISAS[0],
        "allowed_isas": list(cpu.ALLOWED_ISAS),
        "built_isas": sorted({isa for _, _, isa, _, _ in _C.kernels()}, key=cpu.ISAS.index, reverse=True),
        "threads": torch.get_num_threads(),
        "gpus": gpus(),
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("PYENGINE_")},
    }


def machine() -> dict[str, Any]:
    """The part of it that belongs beside every measured number, and when it was measured (UTC)."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "isa": cpu.ALLOWED_ISAS[0],
        "threads": torch.get_num_threads(),
        "os": os_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyengine": __version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def os_name() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo(*keys: str) -> str:
    """The value of the first of these keys in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    table = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))
    }
    return next((table[key] for key in keys if table.get(key)), "")


def cpu_model() -> str:
    """The processor's name, with family and model, since virtual machines often cut the name short."""
    name = _cpuinfo("model name", "Model", "Hardware") or platform.processor() or platform.machine()
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    return f"{name} (family {family} model {model})" if family and model else name


def cpu_features() -> list[str]:
    """Those of CPU_FLAGS that the operating system reports; empty where it reports none."""
    flags = set(_cpuinfo("flags", "Features").split())
    return [flag for flag in CPU_FLAGS if flag in flags]


def gpus() -> list[str]:
    """Names of the CUDA or ROCm devices that torch sees."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def commit() -> str | None:
    """The commit of the checkout that pyengine runs from, and "-dirty" if tracked files differ; else None."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def kernels() -> list[dict[str, Any]]:
    """Every kernel: op, name, layout, isa, supported (by this processor, or a GPU and Triton that are here).

    chosen_for: the formats of formats.FORMATS, with the activations, that the kernel runs on its device.
    """
    layouts = {kernel.name: kernel.layout.name for kernel in (*cpu.SUPPORTED, *KERNELS)}
    gpu = triton.available() and torch.cuda.is_available()
    rows = [(op, f"{op}_{variant}_{isa}", isa, supported) for op, variant, isa, _, supported in _C.kernels()]
    rows += [(kernel.op, kernel.name, kernel.isa, gpu) for kernel in triton.KERNELS]
    rows += [(kernel.op, kernel.name, kernel.isa, True) for kernel in KERNELS if kernel.fallback]
    chosen = _chosen()
    return [
        {
            "op": op,
            "name": name,
            # A layout does not depend on the CPU's ISA, and the portable kernels run everywhere.
            "layout": layouts.get(name) or layouts[name.removesuffix(isa) + "portable"],
            "isa": isa,
            "supported": supported,
            "chosen_for": chosen.get(name, []),
        }
        for op, name, isa, supported in rows
    ]


def _chosen() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for op in dict.fromkeys(kernel.op for kernel in KERNELS):
        for format in FORMATS.values():
            # An embedding has indices, no activations.
            for spec in (FLOAT,) if op == "embedding" else ACTIVATIONS.values():
                for device in ("cpu", "cuda"):
                    kernel = choose(KERNELS, Problem(op, format, spec, device))
                    # Of the generic kernels, what falls to them on the CPU.
                    if device == "cpu" or not kernel.fallback:
                        found.setdefault(kernel.name, []).append(f"{format.name} {spec.name}")
    return found
