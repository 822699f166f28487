"""One staircase: imports point down only. And what `import pyengine` may not do."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A room imports from its own floor and from those below; kernels stands beside the house.
FLOORS = [
    {"_version", "_C"},
    {"formats", "memory"},
    {"reference", "scheme"},
    {"packed"},
    {"registry", "quantizers"},
    {"backends"},
    {"ops"},
    {"report", "progress", "container", "manifest", "environment"},
    {"nn"},
    {"passes"},
    {"io"},
    {"terminal", "usercode", "demo", "examples", "bench", "cli", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
PACKAGES = {
    "pyengine": ROOT / "pyengine",
    "pyengine.kernels": ROOT / "kernels",
    "pyengine.bench": ROOT / "bench",
}
SOURCES = {
    ".".join((package, *path.relative_to(folder).with_suffix("").parts)): path
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
    if not path.is_relative_to(folder / "kernels") and not path.is_relative_to(folder / "bench")
}
HEAVY = (
    "safetensors",
    "rich",
    "triton",
    "transformers",
    "sentence_transformers",
    "matplotlib",
    "hypothesis",
    "PIL",
)


def imports(tree, module):
    """Absolute names of everything that a module imports, anywhere in it."""
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def arrows(module, source):
    """The rooms that a module imports from, "" for the top of the package."""
    for name in imports(ast.parse(source), module):
        if name.split(".")[0] == "pyengine":
            room = (name + ".").split(".")[1]
            yield room if room in LEVEL or room == "kernels" else ""


def is_downward(room, target):
    if room == "kernels":
        return target == "kernels"
    if room == "formats":
        return False
    if target == "kernels":
        return LEVEL[room] >= LEVEL["backends"]
    # `from pyengine import quantize_` goes to the roof, where only the top floor may go.
    return LEVEL[target] <= LEVEL[room] if target else LEVEL[room] == LEVEL["cli"]


@pytest.mark.parametrize("module", [m for m in SOURCES if m != "pyengine.__init__"])
def test_imports_point_down_only(module):
    room = module.split(".")[1]
    assert room in LEVEL or room == "kernels", f"{module} has no floor: give it one in FLOORS"
    targets = arrows(module, SOURCES[module].read_text())
    up = {target or "pyengine" for target in targets if not is_downward(room, target)}
    assert not up, f"{module} imports {', '.join(sorted(up))}, which lie above it"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyengine.formats", "from . import reference"),
        ("pyengine.formats", "def f():\n    from ._version import __version__"),
        ("pyengine.packed", "from .ops import linear"),
        ("pyengine.backends.cpu", "from .. import nn"),
        ("pyengine.backends.cpu", "from ..passes.quantize import quantize_"),
        ("pyengine.nn.linear", "import pyengine.io"),
        ("pyengine.ops", "from pyengine import Scheme"),
        ("pyengine.kernels.linear", "from pyengine.formats import A8"),
        ("pyengine.packed", "from . import kernels"),
    ],
)
def test_the_check_sees_an_arrow_that_points_up(module, source):
    assert not all(is_downward(module.split(".")[1], target) for target in arrows(module, source))


def test_no_source_file_is_longer_than_500_lines():
    folders = [ROOT / name for name in ("pyengine", "kernels", "bench", "csrc", "tests")]
    files = [
        f
        for folder in folders
        for f in folder.rglob("*")
        if f.suffix in (".py", ".pyi", ".cpp", ".h", ".inc")
    ]
    assert len(files) > 30
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def run_python(script):
    """What a fresh interpreter prints as JSON, outside the checkout."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_pulls_in_nothing_heavy():
    loaded = run_python(
        "import json, sys, torch, numpy; before = set(sys.modules); import pyengine;"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    assert "pyengine" in loaded
    assert not set(HEAVY) & set(loaded)


def test_every_module_imports_without_a_gpu():
    """A package that is not installed may be missing, Triton above all; nothing else may go wrong."""
    modules = [m.removesuffix(".__init__") for m in SOURCES if not m.endswith("__main__")]
    failures = run_python(
        f"""
import importlib, json, os
os.environ["CUDA_VISIBLE_DEVICES"] = ""
failures = {{}}
for name in {modules}:
    try:
        importlib.import_module(name)
    except BaseException as error:
        if not isinstance(error, ModuleNotFoundError) or error.name not in {HEAVY}:
            failures[name] = repr(error)
print(json.dumps(failures))
"""
    )
    assert failures == {}
