"""Settings of hypothesis, and fixtures that change global state and put it back."""

import logging
import os
import sys

import pytest
import torch
from hypothesis import settings

# Under --import-mode=importlib the folder of a test is not on sys.path; the tests import `helpers` from here.
sys.path.insert(0, os.path.dirname(__file__))

# The same examples in every run: a red test stays red until its cause is gone.
settings.register_profile("pyengine", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("pyengine")


@pytest.fixture(scope="module")
def poisoned():
    """torch.empty() is filled with NaN, or with the largest integer: an element that nobody writes shows
    up."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def torch_threads():
    """torch.set_num_threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def flush_denormal():
    """torch.set_flush_denormal, undone at the end."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals to zero")
    torch.set_flush_denormal(False)
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


@pytest.fixture
def quiet(caplog):
    """Loading warns of each layer without a fast kernel."""
    caplog.set_level(logging.CRITICAL, "pyengine")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"
