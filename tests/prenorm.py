"""A small decoder as awq likes it: norms before the layers, a gated product, and some loud channels."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 64


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class OnePlusNorm(RMSNorm):
    def forward(self, x):
        return (1 + self.weight) * F.rms_norm(x, x.shape[-1:])


class Block(nn.Module):
    """Of a transformer: norm before, gated feed-forward."""

    def __init__(self, norm):
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.embed, self.block = nn.Embedding(50, WIDTH), Block(norm)
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, 50)

    def forward(self, ids):
        return self.head(self.norm(self.block(self.embed(ids)))[:, -4:])


GROUPS = {("q", "k", "v"): "norm1", ("o",): None, ("gate", "up"): "norm2", ("down",): "up"}


def decoder(norm=nn.LayerNorm):
    """Two channels of each norm, and three of the gated product, are loud, as some are in language models."""
    torch.manual_seed(0)
    model = Decoder(norm).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, norm):
                module.weight += 0.1 * torch.randn(WIDTH)
                module.weight[5::32] += 30
        model.block.up.weight[7::32] *= 10
    return model


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (4, 12), generator=generator) for _ in range(count)]


def linears(model):
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def with_forward(forward, norm=nn.LayerNorm, **children):
    """A module with norm, a and b (Linear), and what else is given."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = norm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            for name, child in children.items():
                setattr(self, name, child)

        def forward(self, x):
            return forward(self, x)

    torch.manual_seed(0)
    return Net().eval()
