"""The benchmark: what it compares is right, what is wrong gets no speed, and records are complete."""

import json
import math
import sys

import pytest
import torch
from torch import nn

import pyengine as pe
from pyengine import bench, reference
from pyengine.bench import LINEAR, LinearCase, contenders, peers, startup
from pyengine.bench.ours import ours
from pyengine.bench.run import time_interleaved
from pyengine.cli import main

CASE = LinearCase(3, 40, 24)
QUICK = {"seconds": 0.002, "cold_bytes": 4000}
TORCH = list(bench.DEFAULT_PEERS)
NAMES = ["pyengine w8a8", "pyengine w8a8 kernel", "pyengine w8", "pyengine w8 kernel", *TORCH]


def run(**options):
    return bench.run([CASE], **{**QUICK, **options})


def test_every_contender_has_a_record_for_warm_and_for_cold_caches():
    records = run()
    assert [(r["contender"], r["cache"]) for r in records] == [
        (n, c) for c in ("warm", "cold") for n in NAMES
    ]
    for record in records:
        assert record["check"] == "ok"
        assert record["case"] == "3x40x24"
        assert 0 < record["q1_s"] <= record["median_s"] <= record["q3_s"]
        assert record["gmacs"] == pytest.approx(3 * 40 * 24 / record["median_s"] / 1e9)
        assert record["weight_gbs"] == pytest.approx(record["weight_bytes"] / record["median_s"] / 1e9)
        assert record["limit_gmacs"] > 0
        assert record["percent_of_limit"] == pytest.approx(100 * record["gmacs"] / record["limit_gmacs"])
        assert record["activations"] == "signed"
        assert {"cpu", "isa", "threads", "torch", "pyengine", "commit", "date"} <= record["machine"].keys()
        assert json.loads(json.dumps(record, allow_nan=False)) == record
    errors = {record["contender"]: record["relative_error"] for record in records}
    assert errors["torch"] < 1e-6
    assert 1e-4 < errors["pyengine w8"] < errors["pyengine w8a8"] < 0.03
    assert errors["pyengine w8a8 kernel"] == errors["pyengine w8a8"]


def test_the_ratio_is_to_the_fastest_peer_with_the_same_weights_and_cache_state():
    records = run()
    for record in records:
        alike = [r for r in records if (r["cache"], r["weights"]) == (record["cache"], record["weights"])]
        fastest = min((r for r in alike if not r["ours"]), key=lambda r: r["median_s"])
        assert record["fastest_peer"] == fastest["contender"]
        assert record["ratio"] == pytest.approx(fastest["median_s"] / record["median_s"])


def test_a_wrong_result_gets_no_speed(monkeypatch):
    right = reference.linear

    def a_little_off(*arguments, **options):
        return right(*arguments, **options) * (1 + 1e-5)

    monkeypatch.setattr(reference, "linear", a_little_off)
    records = {(record["contender"], record["cache"]): record for record in run()}
    for (name, _), record in records.items():
        if record["ours"]:
            assert "further from the reference" in record["check"], name
            speeds = [record[key] for key in ("median_s", "q1_s", "q3_s", "gmacs", "weight_gbs", "ratio")]
            assert [*speeds, record["percent_of_limit"]] == [None] * 7
        else:
            assert record["median_s"] > 0
    values = list(records.values())
    assert len(bench.problems(values)) == 4
    assert "no speed" in rendered(bench.table(values, 100), 100)


def rendered(table, width):
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize("name", NAMES)
def test_the_check_of_each_contender_sees_one_wrong_number(name):
    torch.manual_seed(0)
    linear = nn.Linear(40, 24).requires_grad_(False)
    everyone = [*ours(linear, 0), *(peers.contender(name, linear, 0) for name in TORCH)]
    contender = next(one for one in everyone if one.name == name)
    x = torch.randn(3, 40)
    with torch.inference_mode():
        y = contender.compute(x).clone()
    assert contender.problem(x, y) == ""
    step = 10 * float(y.norm()) if "torch_int8" in name else 1e-4
    for wrong in (y[1, 2] + step, math.nan):
        bad = y.clone()
        bad[1, 2] = wrong
        assert contender.problem(x, bad) != "", wrong


def test_the_bare_kernel_gives_the_bits_of_the_layer():
    torch.manual_seed(0)
    layer, kernel, *_ = ours(nn.Linear(40, 24).requires_grad_(False), 0)
    x = torch.randn(3, 40)
    with torch.inference_mode():
        assert torch.equal(layer.compute(x), kernel.compute(x))


def test_every_copy_of_the_weight_computes_the_same_on_memory_of_its_own():
    torch.manual_seed(0)
    linear = nn.Linear(40, 24).requires_grad_(False)
    x = torch.randn(3, 40)
    with torch.inference_mode():
        for contender in (
            *ours(linear, 6000),
            *(peers.contender(name, linear, 6000) for name in TORCH),
        ):
            runtime = contender.runtime
            calls, _ = runtime.bind(x, runtime.copies)
            assert len(calls) == runtime.copies == math.ceil(6000 / runtime.weight_bytes)
            if "kernel" not in contender.name:
                assert all(torch.equal(call(), contender.compute(x)) for call in calls)
    layers = [call.func for call in next(ours(linear, 6000)).runtime.bind(x, 7)[0]]
    assert len({layer.layout.data_ptr() for layer in layers}) == len(layers) > 1


def test_copies_are_bounded_for_tiny_weights():
    assert contenders.copies(1, 1 << 27) == contenders.MAX_COPIES
    assert contenders.copies(1 << 30, 1 << 27) == 1
    assert contenders.copies(1 << 20, 1 << 27, contenders.MAX_SESSIONS) == contenders.MAX_SESSIONS


def test_contenders_take_turns_and_cold_ones_take_another_weight_each_time():
    log = []

    def calls(name, copies):
        return [lambda copy=copy: log.append((name, copy)) for copy in range(copies)]

    for evict in (None, lambda: log.append(("evict", 0))):
        log.clear()
        times = time_interleaved([calls("a", 3), calls("b", 2)], 1e-9, evict=evict)
        rounds = len(times[0])
        assert len(times[1]) == rounds >= 7
        turns = [name for i, (name, _) in enumerate(log) if i == 0 or name != log[i - 1][0]]
        turn = ["a", "b"] if evict is None else ["evict", "a", "evict", "b"]
        assert turns[-len(turn) * rounds :] == turn * rounds
        for name, copies in (("a", 3), ("b", 2)):
            used = [copy for who, copy in log if who == name]
            if evict is None:
                assert set(used) == {0}
            else:  # the last one once more, then the next one on the clock
                assert used[1::2] == [i % copies for i in range(len(used) // 2)]
                assert used[::2] == [(i - 1) % copies for i in range(len(used) // 2)]


def test_a_cold_sample_uses_no_weight_twice():
    used = []
    calls = [lambda copy=copy: used.append(copy) for copy in range(4)]
    time_interleaved([calls], 1e-3, evict=lambda: used.append("evict"))
    samples = [sample.split() for sample in " ".join(map(str, used)).split("evict")]
    assert max(map(len, samples)) == len(calls)
    assert all(len(set(sample)) == len(sample) for sample in samples)


def test_calls_that_settle_are_not_on_the_clock():
    counts = []
    for settle in (0.0, 0.002):
        used = []
        times = time_interleaved([[lambda used=used: used.append(0)]], 1e-9, evict=None, settle=settle)
        counts.append(len(used) / len(times[0]))
    assert counts[0] < 3 < 30 < counts[1]


def test_threads_are_set_for_the_run_and_put_back():
    before = torch.get_num_threads()
    records = run(threads=before + 1)
    assert records[0]["machine"]["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_a_peer_that_this_torch_lacks_is_named_and_the_others_are_measured(monkeypatch):
    monkeypatch.delattr(torch.ao.quantization, "quantize_dynamic")
    records = run()
    missing = [record for record in records if record["contender"].startswith("torch_int8")]
    assert [record["cache"] for record in missing] == ["warm", "warm", "cold", "cold"]
    assert all("not available here" in record["check"] for record in missing)
    assert all(record["median_s"] is None and record["weights"] == "int8" for record in missing)
    assert {record["fastest_peer"] for record in records if record["ours"]} == {None}
    assert "torch_int8_fbgemm" in rendered(bench.table(records, 80), 80)


def test_relu_leaves_no_activation_below_zero(monkeypatch):
    seen = []
    exact = contenders.exact
    monkeypatch.setattr(
        sys.modules["pyengine.bench.run"], "exact", lambda linear, x: seen.append(x) or exact(linear, x)
    )
    for activations in ("signed", "relu"):
        run(activations=activations, peers=(), schemes=("w8a8",))
    assert float(seen[0].min()) < 0
    assert torch.equal(seen[1], seen[0].relu())


def test_peers_can_be_left_out():
    records = run(peers=())
    assert {record["contender"] for record in records} == set(NAMES[:4])
    assert all(record["ratio"] is None and record["median_s"] > 0 for record in records)


def test_unknown_peers_raise():
    with pytest.raises(ValueError, match="peer 'nix' is none of torch, torch_int8_fbgemm"):
        run(peers=("torch", "nix"))
    with pytest.raises(ValueError, match="activations 'nix' is none of signed, relu"):
        run(activations="nix")


def test_a_peer_whose_package_is_missing_is_said_and_the_others_are_measured(monkeypatch):
    for package in ("onnx", "onnxruntime", "openvino", "ai_edge_litert"):
        monkeypatch.setitem(sys.modules, package, None)
    records = bench.run([LinearCase(3, 64, 24)], **QUICK, peers=tuple(bench.PEERS))
    for record in records:
        absent = not record["ours"] and not record["contender"].startswith("torch")
        assert record["check"].startswith("not available here: ModuleNotFoundError" if absent else "ok")
        assert (record["median_s"] is None) == absent


def test_schemes_beyond_the_default_are_checked_against_the_reference():
    schemes = ("w4", "w4a8_g32_asym", "w4a8", "w4_g32_asym", "w8a16", "w4a16", "w4a16_g32_asym")
    records = run(schemes=schemes, peers=())
    assert {r["contender"] for r in records} == {f"pyengine {s}{k}" for s in schemes for k in ("", " kernel")}
    assert {record["check"] for record in records} == {"ok"}
    assert all(("int4" in r["kernel"]) == ("w4" in r["contender"]) for r in records)
    assert all(("_a16_" in r["kernel"]) == ("a16" in r["contender"]) for r in records)


def test_shapes_parse_as_they_print():
    for case in (case for suite in LINEAR.values() for case in suite):
        assert LinearCase.parse(case.name) == case
    for text in ("", "1x2", "1x2x3x4", "0x1x1", "-1x1x1", "1 x2x3", "1x2x3\n", "axbxc"):
        with pytest.raises(ValueError, match="MxKxN"):
            LinearCase.parse(text)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_fits_the_terminal_and_cuts_no_number(width):
    records = [
        {**record, "median_s": record["median_s"] and 0.0123456, "q1_s": 0.0122222, "q3_s": 0.0133333}
        for record in run()
    ]
    text = rendered(bench.table(records, width), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count("12345.6") == 2 * len(NAMES)
    assert ("12222.2-13333.3" in text) == (width > 120)
    assert records[0]["machine"]["isa"].upper() in text.splitlines()[0]


def test_a_loss_is_shown_as_a_win_is():
    records = run()
    for record in records:
        if record["contender"] == "pyengine w8":
            record["ratio"] = 0.25
    text = rendered(bench.table(records, 100), 100)
    assert text.count("0.25x") == 2


def test_pyengine_bench_writes_json_lines_beside_the_table(tmp_path, capsys, monkeypatch):
    measure = bench.run
    monkeypatch.setattr(bench, "run", lambda cases, **options: measure(cases, **{**options, **QUICK}))
    path = tmp_path / "records.jsonl"
    assert main(["bench", "linear", "--shape", "3x40x24", "--shape", "1x8x8", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {record["case"] for record in records} == {"3x40x24", "1x8x8"}
    assert len(records) == 2 * 2 * len(NAMES)
    for word in ("3x40x24", "1x8x8", *NAMES):
        assert word in out
    assert main(["bench", "linear", "--shape", "3x40x24", "--peers", "torch", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {json.loads(line)["contender"] for line in lines} == set(NAMES[:5])
    command = ["bench", "linear", "--shape", "3x40x24", "--peers", "", "--activations", "relu", "--json"]
    assert main(command) == 0
    assert {json.loads(line)["activations"] for line in capsys.readouterr().out.splitlines()} == {"relu"}


def test_pyengine_bench_fails_if_a_kernel_of_ours_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(
        reference, "linear", lambda x, codes, *_, **__: torch.zeros(len(x), len(codes)).numpy()
    )
    measure = bench.run
    monkeypatch.setattr(bench, "run", lambda cases, **options: measure(cases, **{**options, **QUICK}))
    assert main(["bench", "linear", "--shape", "3x40x24"]) == 1
    assert "3x40x24 pyengine w8a8: 72 of 72 outputs" in capsys.readouterr().out


def test_the_kernel_that_is_named_is_the_layers():
    layer = pe.nn.Linear.from_float(nn.Linear(40, 24), "w8a8")
    assert run()[0]["kernel"] == layer.kernel


def test_the_rate_of_each_layout_is_recorded_for_both_states_of_memory(monkeypatch):
    monkeypatch.setattr(startup, "WEIGHTS", ((33, 40),))
    rates = startup.layouts()
    assert list(rates) == ["int8, 33x40", "int4, 33x40"]
    assert all(list(of) == ["touched", "fresh"] and min(of.values()) > 0 for of in rates.values())
