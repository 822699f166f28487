"""What a file takes: counted from its own header, on a model of MiniLM's shapes."""

import json
import struct

import pytest
from transformers import BertConfig, BertModel

import pyengine as pe

MINILM = {
    "vocab_size": 64,  # of 30522: the table is not a linear weight
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length, len(data)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("w4_g32", 4 + 16 / 32), ("w4_g32_asym", 4 + 16 / 32 + 8 / 32), ("w3_g32_asym", 3 + 16 / 32 + 8 / 32)],
)
def test_a_linear_weight_takes_its_code_and_its_share_of_scale_and_zero_point(path, scheme, bits):
    model = BertModel(BertConfig(**MINILM)).eval()
    weights = {f"{name}.": m.weight.numel() for name, m in model.named_modules() if hasattr(m, "in_features")}
    pe.save(pe.compress(model, scheme, exclude="*embeddings*", method="round")[0], path)
    header, start, size = header_of(path)
    metadata = header.pop("__metadata__")
    taken = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
    assert start + sum(taken.values()) == size
    codes = sum(
        size for name, size in taken.items() if name.startswith(tuple(weights)) and not name.endswith(".bias")
    )
    assert len(weights) == 37
    assert 8 * codes / sum(weights.values()) == bits
    assert len(metadata["pyengine"].encode()) <= 1024 + 200 * len(weights)
