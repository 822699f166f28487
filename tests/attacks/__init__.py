"""A valid file to attack, and the tools to take it apart. The attacks themselves are rows in table.py.

The files are built from the one that save() writes today, so that each row attacks what it names and nothing
else: the checksum of the manifest is made right again after a change to it, unless that is the attack.
"""

import copy
import json
import struct
import zlib
from dataclasses import dataclass

import torch
from torch import nn

import pyengine as pe


class Net(nn.Module):
    """A bit of everything that a file can hold, in 3 KB. The packed layers are emb, wide and odd."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(5, 8, padding_idx=1)
        self.wide = nn.Linear(8, 7)
        self.odd = nn.Linear(7, 3, bias=False)
        self.again = self.odd
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.Parameter(torch.randn(2, 2))
        self.also = self.tied
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("ids", torch.arange(3), persistent=False)

    def forward(self, ids):
        return self.norm(self.again(self.wide(self.emb(ids)))) + self.tied.sum() + self.mask + self.ids


SCHEME = {"emb": "w8", "wide": "w8a8", "odd": "w3_g4_asym"}


def packed_net(seed=0):
    torch.manual_seed(seed)
    net = Net().eval()
    net.norm.running_mean.normal_()
    for name, scheme in SCHEME.items():
        kind = pe.nn.Embedding if name == "emb" else pe.nn.Linear
        setattr(net, name, kind.from_float(getattr(net, name), scheme, name=name))
    net.again = net.odd
    return net


@dataclass
class File:
    """A safetensors file taken apart."""

    header: dict
    data: bytes

    @classmethod
    def of(cls, content):
        (length,) = struct.unpack("<Q", content[:8])
        return cls(json.loads(content[8 : 8 + length]), content[8 + length :])

    def build(self):
        return assemble(json.dumps(self.header).encode(), self.data)

    @property
    def manifest(self):
        return json.loads(self.header["__metadata__"]["pyengine"])

    @manifest.setter
    def manifest(self, value):
        self.manifest_text = json.dumps(value)

    @property
    def manifest_text(self):
        return self.header["__metadata__"]["pyengine"]

    @manifest_text.setter
    def manifest_text(self, text):
        self.header["__metadata__"].update(pyengine=text, pyengine_crc32=f"{zlib.crc32(text.encode()):08x}")

    def tensor(self, name):
        begin, end = self.header[name]["data_offsets"]
        return bytearray(self.data[begin:end])

    def put(self, name, content, *, dtype=None, shape=None):
        """Replaces the bytes of a tensor, moves those behind it, and makes every checksum right again."""
        content = bytes(content)
        begin, end = self.header[name]["data_offsets"]
        shift = len(content) - (end - begin)
        self.data = self.data[:begin] + content + self.data[end:]
        entry = self.header[name]
        entry.update(dtype=dtype or entry["dtype"], shape=shape or entry["shape"])
        for other in self.header:
            if other not in ("__metadata__", name):
                offsets = self.header[other]["data_offsets"]
                if offsets[0] >= end:
                    self.header[other]["data_offsets"] = [x + shift for x in offsets]
        entry["data_offsets"] = [begin, begin + len(content)]
        self.seal()

    def add(self, name, content, dtype, shape):
        self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(self.data)] * 2}
        self.put(name, content)

    def drop(self, name):
        self.put(name, b"", shape=[0])
        del self.header[name]
        self.seal()

    def seal(self):
        """Makes the checksums those of the tensors that are there."""
        manifest, owned = self.manifest, set()
        for name, layer in manifest["layers"].items():
            parts = [f"{name}.{part}" for part in ("qdata", "scale", "zero", "bias")]
            parts = [part for part in parts if part in self.header]
            layer["crc32"] = self.crc32(parts)
            owned.update(parts)
        manifest["rest"] = self.crc32(sorted(self.header.keys() - owned - {"__metadata__"}))
        self.manifest = manifest

    def crc32(self, names):
        return f"{zlib.crc32(b''.join(self.tensor(name) for name in names)):08x}"

    def copy(self):
        return copy.deepcopy(self)


def assemble(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data
