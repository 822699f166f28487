"""A small model whose five layers can be packed, and what a pass may have changed in a model."""

import torch
from helpers import assert_same_bits
from torch import nn


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Five layers that can be packed: emb, blocks.{0,1}.{up,down}."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(16)

    def forward(self, ids):
        return self.norm(self.blocks(self.emb(ids)))


ALL = ["emb", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def make():
    torch.manual_seed(0)
    return Model().eval()


def ids():
    return torch.arange(20).reshape(4, 5)


def names(report):
    return [change.name for change in report.changes]


def left(report):
    return {item.name: item.reason for item in report.left}


def identities(model):
    """Everything that a pass could touch: modules, tensors and their values, attributes."""
    modules = [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [(name, id(t), t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())]
    return modules, tensors, set(model.__dict__)


def assert_unchanged(model, before):
    modules, tensors, attributes = identities(model)
    assert modules == before[0]
    assert attributes == before[2]
    for (name, which, value), (old_name, old_which, old_value) in zip(tensors, before[1], strict=True):
        assert (name, which) == (old_name, old_which)
        if not value.is_meta:
            assert_same_bits(value, old_value)
