"""Files stay readable for ever: one is kept per released version of the format."""

import json
import sys
from pathlib import Path

import pytest

import pyengine as pe
from pyengine.io import describe

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from make_file import Model, content  # noqa: E402

FILES = sorted((GOLDEN / "files").glob("file_*.safetensors"))


def test_there_is_a_file_of_the_current_version():
    assert "file_{}_{}.safetensors".format(*pe.formats.FORMAT_VERSION) in [path.name for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_released_file_gives_exactly_its_model(path):
    golden = json.loads(path.with_suffix(".json").read_text())
    described = describe(path)
    assert {**described, "library": None} == {**golden["describe"], "library": None}
    assert content(pe.load(path, Model)) == golden["content"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_released_file_keeps_ties_and_shared_layers(path):
    model = pe.load(path, Model)
    assert model.again is model.up
    assert model.tied_too.weight is model.tied.weight
