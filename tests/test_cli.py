"""The command line: exit status, one line for a mistake, and text from files that cannot steer a terminal."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pyengine as pe
from pyengine.backends import cpu, triton
from pyengine.cli import main
from pyengine.terminal import shown, write_text

ZOO = """
import torch
from torch import nn

class Zoo:
    @staticmethod
    def make():
        return make()

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))

def normed():
    return nn.Sequential(*make()[:1], nn.LayerNorm(32), *make()[1:])

batches = [torch.arange(50)] * 2

def more_batches():
    return batches

def no_batches():
    return helper().weight

def broken():
    return helper()

def helper():
    return nn.Linear(3, -1)

def quits():
    raise SystemExit(0)

def a_dict():
    return {"a": 1}

model = make()
"""


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A folder with a module `zoo`, as the current directory; the module is imported anew in each test."""
    (tmp_path / "zoo.py").write_text(ZOO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("zoo", "broken_zoo"):
        sys.modules.pop(name, None)
    yield tmp_path
    for name in ("zoo", "broken_zoo"):
        sys.modules.pop(name, None)


def make_zoo():
    """What `zoo:make` names."""
    namespace = {}
    exec(ZOO, namespace)
    return namespace["make"]()


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (status, stdout, stderr)."""

    def call(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def one_line(err):
    """The message of the only line of an error."""
    assert err.startswith("pyengine: error: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n"), err
    return err[len("pyengine: error: ") : -1]


def compressed(folder, name="m.safetensors"):
    assert main(["compress", "zoo:make", "-o", str(folder / name), "--scheme", "w8a8"]) == 0
    return folder / name


# ---- compress ----------------------------------------------------------------------------------------------


def test_compress_writes_a_file_that_loads_and_says_what_it_did(zoo, run):
    status, out, err = run("compress", "zoo:make", "-o", "m.safetensors", "--scheme", "w8a8")
    assert (status, err) == (0, "")
    assert "int8 a8" in out
    assert f"m.safetensors: {(zoo / 'm.safetensors').stat().st_size / 1000:.2f} kB" in out
    ids = torch.arange(50)
    loaded, model = pe.load("m.safetensors", make_zoo), make_zoo()
    assert isinstance(loaded[1], pe.nn.Linear)
    assert (loaded(ids) - model(ids)).norm() < 0.05 * model(ids).norm()


def test_compress_looks_up_a_dotted_factory(zoo, run):
    assert run("compress", "zoo:Zoo.make", "-o", "m.safetensors", "--scheme", "w8")[0] == 0


def test_compress_overwrites_only_with_force(zoo, run):
    path = compressed(zoo)
    before = path.read_bytes()
    status, _, err = run("compress", "zoo:make", "-o", path, "--scheme", "w8", "--include", "1")
    assert status == 2
    assert "exists; --force" in one_line(err)
    assert path.read_bytes() == before
    assert run("compress", "zoo:make", "-o", path, "--scheme", "w8", "--include", "1", "--force")[0] == 0
    assert path.read_bytes() != before


@pytest.mark.parametrize("option", [(), ("--force",)])
def test_compress_into_a_directory_is_bad_usage(zoo, run, option):
    status, _, err = run("compress", "zoo:make", "-o", ".", "--scheme", "w8", *option)
    assert status == 2
    assert "Is a directory" in one_line(err)


def test_include_and_exclude_choose_layers(zoo, run):
    arguments = ("compress", "zoo:make", "-o", "m.safetensors", "--scheme", "w8", "--force")
    layers = []
    for choice in (("--include", "1", "--include", "3"), ("--exclude", "re:[01]")):
        assert run(*arguments, *choice)[0] == 0
        layers.append(
            [layer["name"] for layer in json.loads(run("info", "m.safetensors", "--json")[1])["layers"]]
        )
    assert layers == [["1", "3"], ["3"]]


@pytest.mark.parametrize("batches", ["batches", "more_batches"])
def test_calibration_data_come_from_the_users_module(zoo, run, batches):
    arguments = (
        "compress",
        "zoo:normed",
        "-o",
        "m.safetensors",
        "--scheme",
        "w4_g32_asym",
        "--method",
        "awq",
    )
    status, out, err = run(*arguments, "--calibration", f"zoo:{batches}")
    assert (status, err) == (0, "")
    assert "awq: output error" in " ".join(out.split())
    (step,) = json.loads(run("info", "m.safetensors", "--json")[1])["recipe"]
    assert step == {"pass": "quantize", "scheme": "w4_g32_asym", "method": "awq"}


def test_a_checkpoint_of_another_run_is_one_line(zoo, run):
    arguments = ["compress", "zoo:normed", "-o", "m.safetensors", "--calibration", "zoo:batches", "--force"]
    arguments += ["--method", "awq", "--checkpoint", "kept"]
    assert run(*arguments, "--scheme", "w4_g32_asym")[0] == 0
    assert list((zoo / "kept").iterdir())
    before = (zoo / "m.safetensors").read_bytes()
    assert run(*arguments, "--scheme", "w4_g32_asym")[0] == 0
    assert (zoo / "m.safetensors").read_bytes() == before
    status, _, err = run(*arguments, "--scheme", "w4_g32")
    assert status == 2
    assert "was quantized with another scheme or weight" in one_line(err)
    assert (zoo / "m.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "method 'awq' needs calibration_data"),
        ("zoo", "'zoo' is not of the form MODULE:ITERABLE"),
        ("zoo:nothing", "module 'zoo' has no 'nothing'"),
        ("zoo:no_batches", "RuntimeError: Trying to create tensor with negative dimension"),
    ],
)
def test_bad_calibration_data_are_one_line(zoo, run, spec, message):
    arguments = ["compress", "zoo:normed", "-o", "m.safetensors", "--scheme", "w4", "--method", "awq"]
    status, _, err = run(*arguments, *([] if spec is None else ["--calibration", spec]))
    assert status == (1 if spec == "zoo:no_batches" else 2)
    assert message in one_line(err)
    assert not (zoo / "m.safetensors").exists()


def test_weights_are_loaded_before_compressing(zoo, run):
    state = {name: torch.full_like(value, 0.5) for name, value in make_zoo().state_dict().items()}
    save_file(state, "w.safetensors")
    arguments = (
        "compress",
        "zoo:make",
        "-o",
        "m.safetensors",
        "--scheme",
        "w8",
        "--weights",
        "w.safetensors",
    )
    assert run(*arguments)[0] == 0
    assert torch.allclose(pe.load("m.safetensors", make_zoo)[1].weight, torch.tensor(0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("3.bias"), "lacks 3.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "has, but the model has not, extra"),
        (lambda state: state.update({"1.bias": torch.zeros(2)}), "size mismatch for 1.bias"),
    ],
)
def test_weights_that_do_not_fit_are_named(zoo, run, change, message):
    state = make_zoo().state_dict()
    change(state)
    save_file(state, "w.safetensors")
    status, _, err = run(
        "compress", "zoo:make", "-o", "m.safetensors", "--scheme", "w8", "--weights", "w.safetensors"
    )
    assert status == 2
    assert message in one_line(err)
    assert not (zoo / "m.safetensors").exists()


BAD_INPUT = [
    ("compress zoo:nix -o m --scheme w8", "module 'zoo' has no 'nix'"),
    ("compress zoo:nix.nix -o m --scheme w8", "module 'zoo' has no 'nix.nix'"),
    ("compress zuu:make -o m --scheme w8", "no module 'zuu'"),
    ("compress zoo.deep:make -o m --scheme w8", "no module"),
    ("compress zoo -o m --scheme w8", "'zoo' is not of the form MODULE:FACTORY"),
    ("compress zoo:a_dict -o m --scheme w8", "zoo:a_dict made a dict, not a torch.nn.Module"),
    ("compress zoo:model -o m --scheme w8", "zoo:model is a Sequential, not a function"),
    ("compress zoo:make -o m --scheme w99", "scheme 'w99'"),
    ("compress zoo:make -o m --scheme wt", "not implemented"),
    ("compress zoo:make -o no/m --scheme w8", "no: No such folder"),
    ("compress zoo:make -o m --scheme w8 --include q*", "'q*' matches no layer"),
    ("compress zoo:make -o m --scheme w8 --weights nix", "nix: No such file"),
    ("compress zoo:make -o m --scheme w8 --weights zoo.py", "zoo.py: "),
    ("compress zoo:make --scheme w8", "required: -o"),
    ("info nix", "nix"),
    ("info zoo.py", "zoo.py"),
    ("info .", "not a regular file"),
    ("info zoo.py --jso", "unrecognized arguments: --jso"),
    ("bench linear --shape 1x2", "shape '1x2' is not of the form MxKxN"),
    ("bench linear --shape 0x2x3", "shape '0x2x3'"),
    ("bench linear --suite nix", "suite 'nix' is none of default, minilm, transformer, quick"),
    ("bench linear --peers nix", "peer 'nix' is none of torch, torch_int8_fbgemm"),
    ("bench linear --threads 0", "--threads: '0' is not a positive number"),
    ("bench", "required: WHAT"),
    ("nix", "'nix'"),
    ("", "required: COMMAND"),
]


@pytest.mark.parametrize(("line", "message"), BAD_INPUT, ids=[line for line, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_status_2(zoo, run, line, message):
    status, out, err = run(*line.split())
    assert (status, out) == (2, "")
    assert message in one_line(err)
    assert sorted(path.name for path in zoo.iterdir() if path.is_file()) == ["zoo.py"]


@pytest.mark.parametrize(
    ("factory", "message", "source"),
    [
        (
            "broken",
            "RuntimeError: Trying to create tensor with negative dimension -1",
            "return nn.Linear(3, -1)",
        ),
        ("quits", "SystemExit: 0", "raise SystemExit(0)"),
    ],
)
def test_an_exception_of_the_users_code_says_where_it_came_from(zoo, run, factory, message, source):
    status, _, err = run("compress", f"zoo:{factory}", "-o", "m", "--scheme", "w8")
    assert status == 1
    line = 1 + ZOO.splitlines().index(f"    {source}")
    assert message in one_line(err)
    assert one_line(err).endswith(f"zoo.py:{line})")


@pytest.mark.parametrize(
    ("source", "message", "line"),
    [
        ("import torch\nx = = 1\n", "SyntaxError: invalid syntax", 2),
        ("\n\nimport not_a_module_of_anyone\n", "ModuleNotFoundError: No module named 'not_a_module", 3),
        ("from json import nix\n", "ImportError: cannot import name 'nix'", 1),
        ("raise ValueError('first\\nsecond \x1b[31m')\n", "ValueError: first second \\x1b[31m", 1),
    ],
)
def test_a_module_that_cannot_be_imported_says_where(zoo, run, source, message, line):
    (zoo / "broken_zoo.py").write_text(source)
    status, _, err = run("compress", "broken_zoo:make", "-o", "m", "--scheme", "w8")
    assert status == 1
    assert message in one_line(err)
    assert one_line(err).endswith(f"broken_zoo.py:{line})")


# ---- info --------------------------------------------------------------------------------------------------


def test_info_json_is_the_description_of_the_file(zoo, run):
    path = compressed(zoo)
    run()
    status, out, err = run("info", path, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == json.loads(json.dumps(pe.io.describe(path)))
    status, out, _ = run("info", path, "--json", zoo / "about.json")
    assert status == 0
    assert "100" not in out
    assert "50x32" in out
    assert json.loads((zoo / "about.json").read_text()) == json.loads(json.dumps(pe.io.describe(path)))
    assert [file.name for file in zoo.glob("*.tmp")] == []


def test_info_of_a_damaged_file_is_status_2_and_names_it(zoo, run):
    path = compressed(zoo)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    run()
    status, _, err = run("info", path)
    assert status == 2
    assert path.name in one_line(err)


HOSTILE = "evil\x1b]0;owned\x07\x1b[31m[bold red]\u202e:smile:\r\n\x9b2J\x7f"


def test_text_of_a_file_cannot_steer_the_terminal(tmp_path, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    model = nn.Module()
    model.add_module(HOSTILE, nn.Linear(8, 8))
    pe.quantize_(model, "w8a8")
    model.alias = getattr(model, HOSTILE)
    path = tmp_path / "m\x1b[31m[bold].safetensors"
    pe.save(model, path)
    status, out, err = run("info", path)
    assert (status, err) == (0, "")
    assert {c for c in out if not c.isprintable()} == {"\n"}
    for harmless in (
        "evil\\x1b]0;owned\\x07",
        "[bold red]",
        ":smile:",
        "\\u202e",
        "m\\x1b[31m[bold].safetensors",
    ):
        assert harmless in out
    assert "\x1b" not in run("info", path, "--json")[1]
    status, _, err = run("info", tmp_path / "no\x1b[31m\n")
    assert status == 2
    assert "no\\x1b[31m" in one_line(err)


def test_shown_keeps_what_can_be_read():
    assert shown("Grüße 中文 [x] :smile:") == "Grüße 中文 [x] :smile:"
    assert shown("a\tb\udc80") == "a\\tb\\udc80"


# ---- env, kernels, version ---------------------------------------------------------------------------------


def test_env_names_what_a_bug_report_needs(run, monkeypatch):
    monkeypatch.setenv("PYENGINE_STRICT", "1")
    status, out, _ = run("env")
    assert status == 0
    for word in (pe.__version__, torch.__version__, cpu.ALLOWED_ISAS[0], "PYENGINE_STRICT 1"):
        assert word in out
    about = json.loads(run("env", "--json")[1])
    assert about["isa"] == cpu.ALLOWED_ISAS[0]
    assert about["variables"]["PYENGINE_STRICT"] == "1"
    assert {
        "pyengine",
        "torch",
        "numpy",
        "python",
        "os",
        "cpu",
        "features",
        "threads",
        "gpus",
    } <= about.keys()


def test_kernels_lists_the_whole_table_and_marks_the_chosen(run):
    kernels = json.loads(run("kernels", "--json")[1])
    rows = {kernel["name"]: kernel for kernel in kernels}
    assert len(rows) == len(kernels)
    expected = {f"{op}_{variant}_{isa}": supported for op, variant, isa, _, supported in pe._C.kernels()}
    expected |= {kernel.name: torch.cuda.is_available() for kernel in triton.KERNELS}
    assert {name: row["supported"] for name, row in rows.items() if row["isa"] != "torch"} == expected
    best = cpu.ALLOWED_ISAS[0]
    assert rows[f"linear_int8_a8_{best}"]["chosen_for"] == ["int8 a8"]
    assert rows["linear_torch"]["chosen_for"]
    served = ["int8 a8"] if triton.available() else []
    assert rows["linear_int8_a8_triton"]["chosen_for"] == served
    on_cpu = [row for row in kernels if row["op"] == "linear" and row["isa"] != "triton"]
    chosen = [pair for row in on_cpu for pair in row["chosen_for"]]
    assert len(chosen) == len(set(chosen))
    for kernel in (*cpu.SUPPORTED, *triton.KERNELS):
        assert rows[kernel.name]["layout"] == kernel.layout.name
    status, out, _ = run("kernels")
    assert status == 0
    assert f"linear_int8_a8_{best}" in out


def test_pyengine_isa_lowers_what_is_chosen():
    environment = {**os.environ, "PYENGINE_ISA": "portable"}
    command = [sys.executable, "-m", "pyengine", "kernels", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=True)
    chosen = {kernel["name"] for kernel in json.loads(done.stdout) if kernel["chosen_for"]}
    assert "linear_int8_a8_portable" in chosen
    assert not any(name.endswith("avx2") for name in chosen)


def test_version(run):
    assert run("--version") == (0, f"pyengine {pe.__version__}\n", "")


# ---- streams and signals -----------------------------------------------------------------------------------


def test_a_reader_that_leaves_is_no_traceback(zoo):
    compressed(zoo)
    command = f"'{sys.executable}' -m pyengine info m.safetensors --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=zoo)
    assert done.stderr == ""


def test_a_terminal_without_unicode_gets_escapes(zoo):
    name = "m\u00fc.safetensors"
    compressed(zoo, name)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "pyengine", "info", name]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=zoo, check=True)
    assert b"m\\xfc.safetensors" in done.stdout


def test_ctrl_c_is_status_130(zoo, run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyengine.cli.make_model", interrupted)
    status, _, err = run("compress", "zoo:make", "-o", "m", "--scheme", "w8")
    assert (status, err) == (130, "pyengine: interrupted\n")


def test_a_fault_of_ours_shows_its_traceback(zoo, run, monkeypatch):
    def faulty(*_):
        raise KeyError("ours")

    monkeypatch.setattr("pyengine.cli.make_model", faulty)
    with pytest.raises(KeyError):
        run("compress", "zoo:make", "-o", "m", "--scheme", "w8")


def test_a_full_disk_is_status_1(zoo, run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "m")

    monkeypatch.setattr("pyengine.cli.make_model", full)
    status, _, err = run("compress", "zoo:make", "-o", "m", "--scheme", "w8")
    assert (status, one_line(err)) == (1, "m: No space left on device")


def test_write_text_leaves_the_old_file_and_no_rubbish_if_it_fails(tmp_path):
    target = tmp_path / "f.json"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "\udc80")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    write_text(target, "new")
    assert target.read_text() == "new"
    with pytest.raises(FileNotFoundError) as failure:
        write_text(tmp_path / "no" / "f", "x")
    assert failure.value.filename == str(tmp_path / "no" / "f")
