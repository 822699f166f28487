"""Layouts, and the memory that linear kernels touch."""

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES_OF_X,
    EVERY_FORMAT,
    INDEX,
    assert_same_bits,
    guarded,
    in_child,
    inputs,
    kernel_cases,
    random_weight,
    weight_of,
)
from hypothesis import given
from hypothesis import strategies as st

from pyengine import _C, ops
from pyengine.backends import KERNELS, cpu
from pyengine.formats import A8, FLOAT, parse_format
from pyengine.registry import Problem, choose

pytestmark = pytest.mark.usefixtures("poisoned")

compiled_kernels = pytest.mark.parametrize(
    ("kernel", "format", "spec"), [case for case in kernel_cases("linear") if not case.values[0].fallback]
)
INT8 = parse_format("int8")
LAYOUTS = {
    f"{kernel.layout.name}-{name}": (kernel.layout, format)
    for kernel in (*cpu.SUPPORTED, *KERNELS)
    for name, format in EVERY_FORMAT.items()
    if kernel.device in ("cpu", "any") and any(
        kernel.serves(ops.Problem(kernel.op, format, spec, "cpu")) for spec in (FLOAT, A8)
    )
}  # fmt: skip
# Of kernels that this machine may not have.
LAYOUTS |= {f"panels16x8-{name}": (cpu.OCTETS, EVERY_FORMAT[name]) for name in ("int8", "int8_f16")}


@pytest.mark.parametrize("case", LAYOUTS)
@given(n=st.integers(0, 40), k=st.integers(1, 70), seed=st.integers(0, 9))
def test_unpacking_a_layout_gives_the_same_bytes(case, n, k, seed):
    layout, format = LAYOUTS[case]
    weight = random_weight(format, n, k, seed)
    again = layout.unpack(layout.pack(weight), format, (n, k))
    assert (again.format, again.shape) == (format, (n, k))
    assert again.tensors().keys() == weight.tensors().keys()
    for name, tensor in weight.tensors().items():
        assert_same_bits(again.tensors()[name], tensor)


@pytest.mark.parametrize("case", LAYOUTS)
def test_packing_writes_every_byte_of_a_layout(case):
    """Memory is poisoned with 255: what packing leaves unwritten differs from a layout in memory full of
    zeros."""
    layout, format = LAYOUTS[case]
    weight = random_weight(format, 17, 33)
    poisoned = layout.pack(weight)
    torch.use_deterministic_algorithms(False)
    try:
        assert layout.pack(weight).equal(poisoned)
    finally:
        torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@compiled_kernels
def test_a_kernel_touches_nothing_outside_its_arrays(kernel, format, spec, at_end):
    """Each array lies against a page without access. The answer is compared too."""

    def check():
        for m, k, n in (
            (1, 1, 1),
            (1, 33, 17),
            (1, 100, 65),
            (2, 7, 15),
            (3, 13, 64),
            (5, 31, 33),
            (7, 259, 16),
            (6, 8, 1),
            (2, 600, 17),
        ):
            weight = random_weight(format, n, k)
            prepared, layout = ops.prepare("linear", weight, spec, kernel=kernel.name)
            for dtype in DTYPES_OF_X:
                x, bias = inputs(m, k, dtype), torch.linspace(-1, 1, n)
                expected = ops.linear_prepared(x, layout, bias, prepared, "gelu")
                memory = [guarded(t, at_end=at_end) for t in (x, layout, bias, torch.full_like(expected, 7))]
                # The workspace is promised to be aligned to 64 bytes: rounded up, it may start a little
                # early.
                group, scale_type, zero = cpu.format_arguments(format)
                size = _C.linear_workspace_bytes(INDEX[kernel.name], m, k, group or k)
                workspace = guarded(np.zeros(-(-size // 64) * 64, np.uint8), at_end=at_end)
                (x_at, _), (layout_at, _), (bias_at, _), (y_at, y) = memory
                code = cpu.DTYPE_CODES[dtype]
                _C.linear(
                    INDEX[kernel.name], x_at, code, m, layout_at, n, k, bias_at, y_at, code,
                    cpu.ACTIVATION_CODES["gelu"], group or k, scale_type, zero, workspace[0],
                )  # fmt: skip
                assert y.tobytes() == expected.view(torch.uint8).numpy().tobytes(), (m, k, n, dtype)

    in_child(check)


def test_the_packer_states_how_large_activations_may_be():
    """See csrc/kernels/linear/panels.h: the largest sum of squares of max(|w|, |~w|) over all rows,
    for each 16 codes along K and both kinds of words."""
    values = np.random.default_rng(0).integers(-128, 128, (33, 40))
    values[:, 16:32] //= 64
    layout = cpu.PANELS.pack(weight_of(INT8, values, np.ones((33, 1), np.float32)))
    t = np.zeros((33, 48), np.int64) + 1
    t[:, :40] = np.maximum(np.abs(values), np.abs(~values))
    energy = (t.reshape(33, 3, 4, 2, 2) ** 2).sum((2, 4)).max(0)
    stored = layout[3 * 16 * 4 :][:12].view(torch.uint16).reshape(3, 2)
    assert stored.tolist() == np.minimum(32767**2 // energy, 65534).tolist()
    assert stored[1].tolist() == [65534, 65534]


def test_where_there_is_smmla_int8_a8_has_a_layout_of_its_own_and_neondot_serves_the_rest():
    rows = [("int8_a8", "i8mm"), ("int8_a8", "neondot"), ("int4_a8", "neondot"), ("int8", "neondot")]
    kernels = [cpu._spec("linear", variant, isa, 0) for variant, isa in rows]
    for format, spec, name, layout in (
        ("int8", A8, "linear_int8_a8_i8mm", "panels16x8"),
        ("int8", FLOAT, "linear_int8_neondot", "panels16x4"),
        ("int4_g32", A8, "linear_int4_a8_neondot", "nibbles16x8"),
    ):
        kernel = choose(kernels, Problem("linear", parse_format(format), spec, "cpu"))
        assert (kernel.name, kernel.layout.name) == (name, layout)
