"""What is said at the end of a run and drawn from its records, on records made by hand."""

import json
import math

import pytest

from pyengine import bench
from pyengine.cli import main

LIMITS = {
    "gmacs_fma": 50.0, "gmacs_int8_pair_sum": 120.0, "gmacs_int4_sum16": 160.0,
    "gbs_l2": 100.0, "gbs_l3": 60.0, "gbs_memory": 20.0, "gbs_memory_1_stream": 18.0,
}  # fmt: skip
MACHINE = {"cpu": "Some CPU", "isa": "avx2", "threads": 1, "date": "2026-01-02T03:04:05+00:00"}
SEQUENCES = {"fp32": "fma", "int8": "int8_pair_sum", "int4": "int4_sum16"}


def record(
    contender, seconds, *, m=1, cache="warm", weights="int8", inputs="dynamic", error=0.01, check="ok"
):
    k = n = 64
    return {
        "bench": "linear", "case": f"{m}x{k}x{n}", "m": m, "k": k, "n": n, "activations": "signed",
        "cache": cache, "contender": contender, "ours": contender.startswith("pyengine"), "weights": weights,
        "inputs": inputs, "weight_bytes": k * n, "check": check, "relative_error": error,
        "median_s": seconds, "gmacs": seconds and m * k * n / seconds / 1e9, "sequence": SEQUENCES[weights],
        "limits": LIMITS, "machine": MACHINE,
    }  # fmt: skip


@pytest.fixture
def records():
    """Against the fastest int8 peer, w8a8 wins 2:1 with one row and loses 1:2 with eight, warm and cold."""
    found = []
    for cache in ("warm", "cold"):
        for name in ("pyengine w8a8", "pyengine w8a8 kernel"):
            found += [record(name, 1e-6, cache=cache), record(name, 8e-6, m=8, cache=cache, error=0.03)]
        found += [
            record("int8 dynamic", 3e-6, cache=cache),
            record("int8 dynamic", 6e-6, m=8, cache=cache, error=0.02),
            record("int8 worse", 9e-6, m=8, cache=cache, error=0.09),
            record("int8 static", 2e-6, cache=cache, inputs="static", error=0.001),
            record("int8 static", 4e-6, m=8, cache=cache, inputs="static"),
            record("wrong", None, cache=cache, check="relative error 3 is above 0.1"),
            record("absent", None, cache=cache, check="not available here: no"),
            record("torch", 1e-5, cache=cache, weights="fp32", inputs="float"),
            record("torch", 4e-6, m=8, cache=cache, weights="fp32", inputs="float"),
        ]
    return found


def text(parts, width=80):
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()


def test_each_cell_is_against_its_fastest_peer_with_the_same_kind_of_weights(records):
    found = {(c.contender, c.cache, c.against): c for c in bench.compare(records)}
    both = found["pyengine w8a8", "warm", "int8"]
    assert [(cell.ours["case"], cell.peer["contender"], cell.ratio) for cell in both.cells] == [
        ("1x64x64", "int8 static", pytest.approx(2.0)), ("8x64x64", "int8 static", pytest.approx(0.5)),
    ]  # fmt: skip
    assert both.mean == pytest.approx(1.0)
    assert [cell.ours["case"] for cell in both.lost] == ["8x64x64"]
    dynamic = found["pyengine w8a8", "warm", "int8 dynamic"]
    assert dynamic.mean == pytest.approx(math.sqrt(3.0 * 0.75))
    floats = found["pyengine w8a8", "cold", "fp32"]
    assert floats.mean == pytest.approx(math.sqrt(10 * 0.5))


def test_the_error_is_over_the_best_dynamic_peers_of_the_same_cell(records):
    assert bench.summary(records)
    assert "1.50x" in next(line for line in text(bench.summary(records)).splitlines() if " int8 " in line)


@pytest.mark.parametrize("width", [80, 120])
def test_lost_cells_are_listed_as_plainly_as_means(records, width):
    shown = text(bench.summary(records), width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["w8a8", "int8", "1.00x", "1", "1", "1.00x", "1", "1", "1.50x"] in lines
    assert lines.count(["8x64x64", "0.50x", "8.0", "int8", "static", "4.0"]) == 4
    assert not [line for line in lines if line[:1] == ["1x64x64"]]


def test_where_all_is_won_nothing_is_listed_and_the_rows_that_say_the_same_are_left_out(records):
    won = [r for r in records if r["m"] == 1 and r["inputs"] != "static"]
    shown = text(bench.summary(won))
    assert "Lost" not in shown
    assert "dynamic" not in shown


def test_without_a_peer_of_such_weights_the_mean_is_open(records):
    alone = [r for r in records if r["ours"] or r["weights"] == "fp32"]
    row = next(line.split() for line in text(bench.summary(alone)).splitlines() if " int8 " in line)
    assert row == ["w8a8", "int8", "-", "0", "0", "-", "0", "0", "-"]


def test_pictures_are_drawn_from_a_file_of_records(records, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    assert main(["bench", "plot", str(path), "--output", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "new" / f) for f in ("roofline.png", "speedup.png")
    ]
    for picture in (tmp_path / "new").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")


def drawn(figure):
    return [t.get_text() for axes in figure.axes for t in axes.texts] + [figure.get_suptitle()]


def test_the_speed_up_picture_says_every_ratio_lost_or_won_and_the_machine(records):
    pytest.importorskip("matplotlib")
    from pyengine.bench.plot import speedup

    figure = speedup(records)
    texts = drawn(figure)
    assert texts[:-1] == ["2.00", "0.50"] * 2
    assert [t.get_fontweight() for t in figure.axes[0].texts] == ["normal", "bold"]
    won, lost = (patch.get_facecolor() for patch in figure.axes[0].patches)
    assert won[2] > won[0]
    assert lost[0] > lost[2]
    for word in ("AVX2", "1 thread", "Some CPU", "2026-01-02", "signed"):
        assert word in texts[-1]


def test_a_cell_without_a_speed_is_a_dash(records):
    pytest.importorskip("matplotlib")
    from pyengine.bench.plot import speedup

    red = [{**r, "median_s": None, "gmacs": None} if r["ours"] and r["m"] == 8 else r for r in records]
    assert drawn(speedup(red))[:-1] == ["2.00", "-"] * 2


def test_the_roofline_has_the_roofs_that_matter_and_our_kernels(records):
    pytest.importorskip("matplotlib")
    from pyengine.bench.plot import roofline

    figure = roofline(records)
    texts = " ".join(drawn(figure))
    for word in ("fp32 FMA 50", "int8 pair sum 120", "L2 100", "L3 60", "memory 20", "AVX2", "Some CPU"):
        assert word in texts
    assert "int4" not in texts
    labels = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert labels == ["fastest peer of a cell", "w8a8 kernel"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no records"),
        (["nix"], "line 1 is no record of pyengine bench linear: no 'case'"),
        ([{"case": "1x1x1"}], "line 1 is no record of pyengine bench linear: no 'm'"),
        ([record("a", 1.0), {**record("a", 1.0), "machine": {**MACHINE, "threads": 2}}], "several machines"),
    ],
)
def test_files_that_are_no_records_of_one_machine_are_refused(tmp_path, capsys, lines, message):
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert main(["bench", "plot", str(path)]) == 2
    assert message in capsys.readouterr().err
