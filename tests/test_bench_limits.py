"""The measured limits, and which of them a kernel is held against."""

import sys

import pytest
import torch

from pyengine import _C, bench
from pyengine.backends import cpu
from pyengine.bench import limits
from pyengine.bench.limits import attainable

HAS_SEQUENCES = any(name == "fma" and isa in cpu.ALLOWED_ISAS for _, name, isa, _, _ in _C.limits())
FOUND = {"gmacs_fma": 50.0, "gbs_l2": 100.0, "gbs_l3": 50.0, "gbs_memory": 20.0}


@pytest.fixture
def caches(monkeypatch):
    sizes = {2: 1000, 3: 10_000}
    # The package's attribute `limits` is the function, not the file.
    monkeypatch.setattr(sys.modules["pyengine.bench.limits"], "cache_bytes", sizes.__getitem__)
    return sizes


@pytest.mark.parametrize("threads", [1, 2])
def test_limits_are_positive_and_threads_are_put_back(threads):
    before = torch.get_num_threads()
    found = limits(threads, torch.ones(2**22, dtype=torch.uint8))
    assert torch.get_num_threads() == before
    assert {"gbs_l2", "gbs_l3", "gbs_memory", "gbs_memory_1_stream"} <= found.keys()
    assert all(value > 0 for value in found.values())
    assert ("gmacs_fma" in found) == HAS_SEQUENCES


def test_work_that_is_counted_is_work_that_is_asked_for():
    data = torch.ones(64 * 24, dtype=torch.uint8)
    macs = {"fma": 64, "int16_dot2": 128, "int8_dot4": 256, "int8_pair_sum": 512, "int4_sum16": 256}
    for _, name, _, index, supported in _C.limits():
        if supported:
            done = _C.run_limit(index, data.data_ptr(), data.numel(), 4, 10, 3)
            # Each of 3 threads has 8 lines, whole ones for each of 4 streams.
            assert done == (64 * 24 * 10 if name == "read" else macs[name] * 10 * 3), name


def test_a_limit_of_an_index_that_is_not_there_raises():
    with pytest.raises(IndexError):
        _C.run_limit(len(_C.limits()), 0, 0, 1, 1, 1)


@pytest.mark.skipif(not HAS_SEQUENCES, reason="no limits of arithmetic for the allowed instruction sets")
def test_fewer_instructions_per_product_are_no_slower():
    found = limits(1, torch.ones(2**20, dtype=torch.uint8))
    # By a quarter and more where measured; what is asked of a busy machine is the order.
    assert found["gmacs_fma"] < found["gmacs_int8_pair_sum"]
    assert found["gmacs_fma"] < found["gmacs_int4_sum16"]


def test_many_products_per_byte_are_held_against_arithmetic_and_few_against_reading(caches):
    assert attainable(FOUND, "fma", 10**6, 500, cold=True, threads=1) == ("gmacs_fma", 50.0)
    assert attainable(FOUND, "fma", 500, 500, cold=True, threads=1) == ("gbs_memory", pytest.approx(20.0))
    assert attainable(FOUND, "fma", 500, 2000, cold=True, threads=1) == ("gbs_memory", pytest.approx(5.0))


def test_warm_weights_come_from_the_caches_that_hold_them_each_at_its_speed(caches):
    assert attainable(FOUND, "", 100, 1000, cold=False, threads=1) == ("gbs_l2", pytest.approx(10.0))
    seconds = 1000 / 100e9 + 1000 / 50e9
    assert attainable(FOUND, "", 100, 2000, cold=False, threads=1) == (
        "gbs_l3",
        pytest.approx(1e-7 / seconds),
    )
    assert attainable(FOUND, "", 100, 2000, cold=False, threads=2) == ("gbs_l2", pytest.approx(5.0))
    assert attainable(FOUND, "", 100, 20_000, cold=False, threads=1)[0] == "gbs_memory"


def test_without_known_caches_and_sequences_there_is_no_limit(caches):
    caches.update({2: 0, 3: 0})
    assert attainable(FOUND, "fma", 100, 1000, cold=False, threads=1) == ("gmacs_fma", 50.0)
    assert attainable(FOUND, "dot", 100, 1000, cold=False, threads=1) == (None, None)


@pytest.mark.skipif(not HAS_SEQUENCES, reason="no limits of arithmetic for the allowed instruction sets")
def test_every_sequence_that_a_contender_names_is_in_the_table():
    case = bench.LinearCase(3, 64, 24)
    schemes = ("w8a8", "w8", "w4a8_g32", "w4_g32", "w8a16", "w4a16")
    records = bench.run([case], schemes=schemes, seconds=0.001, cold_bytes=4000)
    by_scheme = {r["contender"]: r["sequence"] for r in records if r["ours"]}
    assert {f"gmacs_{name}" for name in by_scheme.values()} <= records[0]["limits"].keys()
    assert [by_scheme[f"pyengine {scheme}"] for scheme in schemes] == [
        "int8_pair_sum", "fma", "int4_sum16", "fma", "int16_dot2", "int16_dot2",
    ]  # fmt: skip
