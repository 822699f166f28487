"""Every example runs as it stands, as a script of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

import pyengine.examples

SCRIPTS = sorted(p for p in Path(pyengine.examples.__file__).parent.glob("*.py") if p.name != "__init__.py")

# What a reader is promised to see.
PROMISED = {
    "quickstart": "relative error of the outputs: 0.0",
    "microbenchmark": "x the speed of the fastest peer",
}


def test_there_is_a_promise_for_every_example():
    assert {script.stem for script in SCRIPTS} == PROMISED.keys()


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_example_runs(script, tmp_path):
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert PROMISED[script.stem] in done.stdout
    assert list(tmp_path.iterdir()) == []
