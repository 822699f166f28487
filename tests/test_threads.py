"""Threads, forks and instruction sets: the answer is the same, and nobody waits for the interpreter's
lock."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same_bits, in_child, inputs, kernel_cases, random_weight

import pyengine as pe
from pyengine import _C, ops
from pyengine.backends import cpu
from pyengine.formats import A8, ACTIVATIONS, parse_format
from pyengine.registry import Problem, choose

compiled = [case for case in kernel_cases("linear") if not case.values[0].fallback]
kernels = pytest.mark.parametrize(("kernel", "format", "spec"), compiled)
embeddings = [case for case in kernel_cases("embedding") if not case.values[0].fallback]
INT8 = parse_format("int8")


def large_layer(kernel, format, spec, m=40, k=515, n=1100):
    """A call that is large enough to be split over threads, many times over: (function, x)."""
    prepared, layout = ops.prepare("linear", random_weight(format, n, k), spec, kernel=kernel.name)
    bias = torch.linspace(-1, 1, n)
    return lambda x: ops.linear_prepared(x, layout, bias, prepared, "silu"), inputs(m, k)


@kernels
def test_the_number_of_threads_changes_no_bit(kernel, format, spec, torch_threads):
    call, x = large_layer(kernel, format, spec)
    torch_threads(1)
    alone, row = call(x), call(x[:1])
    for threads in (2, 3):
        torch_threads(threads)
        assert_same_bits(call(x), alone)
        assert_same_bits(call(x[:1]), row)


@pytest.mark.parametrize(("kernel", "format", "spec"), embeddings)
def test_the_number_of_threads_changes_no_bit_of_an_embedding(kernel, format, spec, torch_threads):
    prepared, layout = ops.prepare("embedding", random_weight(format, 50, 515), kernel=kernel.name)
    ids = torch.arange(1000) % 50
    torch_threads(1)
    alone = ops.embedding_prepared(ids, layout, prepared, torch.bfloat16)
    torch_threads(2)
    assert_same_bits(ops.embedding_prepared(ids, layout, prepared, torch.bfloat16), alone)


def test_a_large_call_really_is_split_over_threads(torch_threads):
    """Else the tests of this file would test little. A new Python thread has no team of workers yet: its
    first parallel call starts one."""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("the threads of a process are counted in /proc")
    torch_threads(2)
    call, x = large_layer(*compiled[0].values)
    before, after = set(), set()

    def fresh():
        before.update(os.listdir("/proc/self/task"))
        call(x)
        after.update(os.listdir("/proc/self/task"))

    thread = threading.Thread(target=fresh)
    thread.start()
    thread.join()
    assert after - before


@kernels
def test_eight_python_threads_get_the_same_bits(kernel, format, spec, torch_threads):
    torch_threads(2)
    call, x = large_layer(kernel, format, spec, m=7)
    alone = call(x)
    together = threading.Barrier(8)

    def work(_):
        together.wait()
        return [call(x) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    for result in results:
        for y in result:
            assert_same_bits(y, alone)


@kernels
def test_another_python_thread_runs_during_a_call(kernel, format, spec, torch_threads):
    """The lock is released. The proof needs no clock: rows are written from the first to the last, and this
    thread sees the first one written while the last is not. Under the lock it could see only nothing or
    all."""
    torch_threads(1)
    n, k, m = 64, 512, 8192
    _, layout = ops.prepare("linear", random_weight(format, n, k), spec, kernel=kernel.name)
    x = inputs(m, k)
    seen = False
    for _ in range(50):  # the scheduler may keep this thread waiting for a whole call, but not for ever
        y = torch.full((m, n), float("nan"))
        bare = threading.Thread(target=cpu.linear_into, args=(y, kernel, format, x, layout, (n, k)))
        first, last = y.view(-1)[:1].numpy(), y.view(-1)[-1:].numpy()
        bare.start()
        while bare.is_alive():
            # The last element is read first: if it is missing now, then the call was in flight now.
            if last[0] != last[0] and first[0] == first[0] and last[0] != last[0]:
                seen = True
                break
        bare.join()
        assert not y.isnan().any()
        if seen:
            return
    pytest.fail("no call was seen in flight")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@kernels
def test_a_forked_child_runs_a_large_layer(kernel, format, spec, torch_threads):
    """The threads of torch's pool do not survive a fork: a child that waited for them would hang."""
    torch_threads(2)
    call, x = large_layer(kernel, format, spec)
    expected = call(x)
    content = expected.numpy().tobytes()

    def check():  # without torch: a comparison of this size would want the pool's threads
        assert call(x).numpy().tobytes() == content

    in_child(check)
    # And the parent goes on with its threads.
    assert_same_bits(call(x), expected)


# ---- instruction sets --------------------------------------------------------------------------------------


def in_a_fresh_process(isa, script):
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYENGINE_ISA": isa},
        capture_output=True,
        text=True,
        cwd="/",
    )


def test_pyengine_isa_selects_and_the_rest_can_still_be_forced():
    done = in_a_fresh_process(
        "portable",
        """
import json, torch, pyengine as pe
from pyengine.backends import cpu
w = pe.PackedWeight.quantize(torch.ones(2, 3), pe.WeightFormat())
layers = [pe.nn.Linear(w), pe.nn.Linear(w, input_spec=pe.ops.ACTIVATIONS["a8"]), pe.nn.Embedding(w)]
print(json.dumps([[layer.kernel for layer in layers], sorted({kernel.isa for kernel in cpu.SUPPORTED})]))
""",
    )
    assert done.returncode == 0, done.stderr
    chosen, supported = json.loads(done.stdout)
    assert all(name.endswith("_portable") for name in chosen)
    assert supported == sorted({kernel.isa for kernel in cpu.SUPPORTED})


def test_an_unknown_pyengine_isa_raises_value_error_at_import():
    done = in_a_fresh_process("nonsense", "import pyengine")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ValueError: PYENGINE_ISA='nonsense' is none of portable, "
    )


@pytest.mark.parametrize(
    ("wish", "machine", "allowed"),
    [
        ("", ("portable", "avx2"), ("avx2", "portable")),
        (None, ("portable", "avx2"), ("avx2", "portable")),
        ("avx2", ("portable", "avx2"), ("avx2", "portable")),
        ("portable", ("portable", "avx2"), ("portable",)),
        ("avx2", ("portable",), ("portable",)),
        (None, ("portable",), ("portable",)),
        (None, cpu.ISAS, cpu.ISAS[::-1]),
        ("avxvnni", cpu.ISAS, ("avxvnni", "avx2", "portable")),
    ],
)
def test_pyengine_isa_can_only_lower(wish, machine, allowed, monkeypatch):
    monkeypatch.delenv("PYENGINE_ISA", raising=False)
    if wish is not None:
        monkeypatch.setenv("PYENGINE_ISA", wish)
    monkeypatch.setattr(cpu, "_C", SimpleNamespace(isa_supported=lambda isa: isa in machine))
    assert cpu._allowed_isas() == allowed


@pytest.mark.parametrize(
    ("op", "format", "input_spec", "best"),
    [
        ("linear", "int8", "a8", "amx"),
        ("linear", "int8", "a16", "avx512vnni"),
        ("linear", "int4_g32", "a8", "avx512vnni"),
        ("linear", "int4_g32", "float", "avx512vnni"),
        ("embedding", "int8", "float", "avx2"),
    ],
)
def test_where_the_best_instruction_set_has_no_kernel_the_next_best_is_chosen(op, format, input_spec, best):
    """On a processor that has all that this extension was built with."""
    rows = sorted(_C.kernels(), key=lambda row: cpu.ISAS.index(row[2]), reverse=True)
    kernels = [cpu._spec(row[0], row[1], row[2], row[3]) for row in rows]
    if best not in {kernel.isa for kernel in kernels}:
        pytest.skip(f"this extension was built without {best}")
    problem = Problem(op, parse_format(format), ACTIVATIONS[input_spec], "cpu")
    assert choose(kernels, problem).isa == best


def test_the_chosen_kernel_is_of_the_best_allowed_instruction_set():
    layer = pe.nn.Linear(random_weight(INT8, 5, 8), input_spec=A8)
    assert layer.kernel == f"linear_int8_a8_{cpu.ALLOWED_ISAS[0]}"
    assert _C.isa_supported(cpu.ALLOWED_ISAS[0])
