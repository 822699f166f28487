"""The Triton backend without a GPU: the files of tests/gpu, in a process each."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyengine.backends import triton

needs_triton = pytest.mark.skipif(not triton.available(), reason="Triton is not installed")
FILES = Path(__file__).parent / "gpu"


@needs_triton
@pytest.mark.parametrize(
    ("file", "variables", "least"),
    [("interpreted.py", {"TRITON_INTERPRET": "1"}, 89), ("compiled.py", {}, 75), ("fakes.py", {}, 12)],
)
def test_kernels(file, variables, least, tmp_path):
    """In a process each, from an empty cache: one cannot both interpret and compile, and one tampers with
    torch.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), **variables}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FILES / file)]
    # Elsewhere, or Python would find the checkout's folder before the installed package.
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert "skipped" not in summary
    assert int(re.search(r"(\d+) passed", summary)[1]) >= least
