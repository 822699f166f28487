"""Makes files/file_<major>_<minor>.safetensors and what must be read from it, once per format version.

    python tests/golden/make_file.py

It refuses to overwrite: files stay readable for ever.
"""

import json
from pathlib import Path

import torch
from torch import nn

import pyengine as pe
from pyengine.formats import FORMAT_VERSION
from pyengine.io import describe

FOLDER = Path(__file__).parent / "files"


class Model(nn.Module):
    """Every kind of entry that a file of version 1.0 has."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12, padding_idx=3)
        self.up = nn.Linear(12, 17)
        self.again = self.up
        self.down = nn.Linear(17, 12, bias=False)
        self.groups = nn.Linear(12, 5)
        self.norm = nn.LayerNorm(12)
        self.tied = nn.Linear(12, 12, bias=False)
        self.tied_too = nn.Linear(12, 12, bias=False)
        self.tied_too.weight = self.tied.weight
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("volatile", torch.arange(3.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(ids))
        return self.groups(self.tied(self.down(torch.relu(self.up(x)))))


SCHEMES = {"groups": "w4_g32_asym", "tied*": None, "*": "w8a8"}


def content(model: nn.Module) -> dict[str, object]:
    """What must be read: every tensor of the model, exactly, as text."""
    state = {**model.state_dict(), "volatile": model.get_buffer("volatile")}
    return {name: tensor.tolist() for name, tensor in state.items()}


def main() -> None:
    stem = FOLDER / "file_{}_{}".format(*FORMAT_VERSION)
    path = stem.with_suffix(".safetensors")
    if path.exists():
        raise SystemExit(f"{path} exists")
    torch.manual_seed(1)
    model, _ = pe.compress(Model().eval(), SCHEMES)
    pe.save(model, path)
    golden = {"describe": describe(path), "content": content(model)}
    stem.with_suffix(".json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
