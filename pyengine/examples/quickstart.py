"""Quantize a model, save it, load it and compare it with the float one."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import pyengine as pe


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))


torch.manual_seed(0)
model, x = make_model().eval(), torch.randn(32, 256)
compressed, report = pe.compress(model, "w8a8")  # int8 weights, activations rounded to int8 as they come
print(report)

with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
    path = Path(folder, "model.safetensors")
    pe.save(compressed, path)
    loaded = pe.load(path, make_model)
    error = (loaded(x) - model(x)).norm() / model(x).norm()
    print(f"file: {path.stat().st_size} bytes, relative error of the outputs: {error:.4f}")
