"""Bytes that another package reads and writes too: "pack-quantized" of compressed-tensors."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers import random_weight

from pyengine.formats import parse_format
from pyengine.packed import pack_codes

# K * bits is a multiple of 32: there is no padding. N is anything.
SHAPES = [(1, 8), (7, 64), (16, 96), (33, 160)]
NAMES = ["int4", "int4_g8", "int8", "int8_g32", "uint4", "uint4_g8", "uint8", "uint8_g32"]
layers = [
    (name, shape) for name in NAMES for shape in SHAPES if not shape[1] % (parse_format(name).group_size or 1)
]


def words(rows):
    """The bytes of each row as int32, filled up with zeros."""
    filled = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))
    return filled.flatten().view(torch.int32).view(len(rows), -1)


def theirs(weight):
    """A weight of ours as the package stores it. Codes are the same bytes. Zero points differ: ours are a
    byte each, in the order of the scales; theirs are packed like codes, but along N.
    """
    state = {
        "weight_packed": weight.qdata.view(torch.int32),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if weight.zero is not None:
        along_n = pack_codes(weight.zero.t().contiguous(), weight.format.bits)
        state["weight_zero_point"] = words(along_n).t().contiguous()
    return state


def scheme(format):
    group, symmetric = format.group_size, format.encoding == "int"
    arguments = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=format.bits, symmetric=symmetric, **arguments)
    return QuantizationScheme(targets=["Linear"], weights=weights)


@pytest.mark.parametrize(("name", "shape"), layers)
def test_the_package_reads_our_bytes_and_writes_them(name, shape):
    format = parse_format(name)
    weight = random_weight(format, *shape)
    state = theirs(weight)
    read = PackedQuantizationCompressor.decompress(state, scheme(format))
    assert read["weight"].equal(weight.dequantize(state["weight_scale"].dtype))
    zero = None if weight.zero is None else (weight.zero.int() - 2 ** (format.bits - 1)).to(torch.int8)
    parts = {"weight": weight.dequantize(), "weight_scale": weight.scale, "weight_zero_point": zero}
    written = PackedQuantizationCompressor.compress(parts, scheme(format))
    assert written.keys() == state.keys()
    for key, tensor in state.items():
        assert written[key].equal(tensor), key


@pytest.mark.parametrize("shape", [(5, 32), (3, 31), (7, 100), (1, 1)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_every_width_are_one_stream_there_too_with_rows_filled_up_to_words(bits, shape):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    packed = pack_to_int32(signed, bits)
    assert packed.equal(words(pack_codes(codes, bits)))
    assert unpack_from_int32(words(pack_codes(codes, bits)), bits, codes.shape).equal(signed)
