"""How much memory load and save take at their peak, measured in processes of their own.

The promise: pe.load takes at most 1.15 times (layouts + tensors that stay float) plus the largest layer. What
is measured is the growth of the resident set, the highest during the call against the last before it, in a
process that has loaded a small model already, so that code loaded on first use does not count.
"""

import json
import os
import subprocess
import sys

import pytest

if not os.path.exists("/proc/self/clear_refs"):
    pytest.skip("needs the counters of Linux", allow_module_level=True)

# Python's own objects for modules and manifest, and the edges of pages: 30 KB a layer, of which there are 24.
ALLOWANCE = 24 * 30 * 1024

COMMON = """
import ctypes, gc, json, logging, re, sys
import torch
from torch import nn
torch.set_num_threads(1)
import pyengine as pe
logging.disable()

def resident(key):
    return 1024 * int(re.search(key + r":\\s*(\\d+)", open("/proc/self/status").read())[1])

def make(width=WIDTH, depth=24):
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
    model.add_module("norm", nn.LayerNorm(width))
    model.register_parameter("table", nn.Parameter(torch.zeros(width, width)))
    return model

def tiny():
    return make(32, 1)

def peak(work):
    gc.collect()
    # What malloc holds in reserve would hide as much of the growth.
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    result = work()
    return result, resident("VmHWM") - before

def sizes(model):
    layouts = [m.layout.nbytes for m in model.modules() if hasattr(m, "layout")]
    rest = sum(p.nbytes for p in model.parameters())
    return sum(layouts), rest, max(layouts)
"""
# Layers of about 3 MB each, 70 MB together, and 12 to 21 MB that stay float.
WIDTHS = {"w8a8": 1728, "w4_g32": 2304}


def run(script, scheme, *arguments):
    command = [
        sys.executable,
        "-c",
        COMMON.replace("WIDTH", str(WIDTHS[scheme])) + script,
        *map(str, arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


SAVE = """
def layer(width):
    return pe.nn.Linear.from_float(nn.Linear(width, width), sys.argv[2])

for model, path in ((tiny(), sys.argv[1] + ".tiny"), (make(), sys.argv[1])):
    for i in range(len(model) - 1):
        model[i] = layer(model[i].in_features)
    _, grown = peak(lambda: pe.save(model, path))
print(json.dumps([grown, *sizes(model)]))
"""

LOAD = """
options = {"mmap": sys.argv[2] == "True"}
pe.load(sys.argv[1] + ".tiny", tiny, **options)
model, grown = peak(lambda: pe.load(sys.argv[1], make, **options))
print(json.dumps([grown, *sizes(model)]))
"""


@pytest.fixture(scope="module", params=WIDTHS)
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "model.safetensors"
    return request.param, path, run(SAVE, request.param, path, request.param)


def test_save_unpacks_one_layer_at_a_time(saved):
    """Its canonical bytes, as much again while they are checked, and what malloc keeps: 3 layers of 24."""
    _, _, (grown, layouts, _, largest) = saved
    assert grown < 3 * largest + ALLOWANCE, f"{grown / layouts:.2f} of the layouts"


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_load_takes_little_more_than_what_it_makes(saved, mmap):
    scheme, path, _ = saved
    grown, layouts, rest, largest = run(LOAD, scheme, path, mmap)
    print(f"{scheme} mmap={mmap}: peak {grown / (layouts + rest):.3f} of layouts + rest, {grown >> 20} MB")
    assert 50 << 20 < layouts < 100 << 20
    assert grown <= 1.15 * (layouts + rest) + largest + ALLOWANCE
    # And it did load: less than everything would mean that the counter does not count.
    assert grown > 0.9 * layouts


def test_describe_and_a_refused_load_read_no_layer_into_memory(saved):
    scheme, path, _ = saved
    script = """
import os
def refused():
    try:
        pe.load(sys.argv[1], lambda: nn.Sequential(make(), nn.Linear(4, 4)))
    except pe.FormatError:
        return os.path.getsize(sys.argv[1])
pe.io.describe(sys.argv[1] + ".tiny")
print(json.dumps(peak(refused)))
"""
    size, grown = run(script, scheme, path)
    assert grown < size / 20


def test_gptq_works_in_the_memory_of_the_moments():
    """Half of them again, and a few times the weight, where every step once took a matrix of its own."""
    script = """
from pyengine import quantizers
from pyengine.formats import parse_format
weight, x = torch.randn(128, 2048), torch.randn(4096, 2048)
moments = x.t() @ x
quantizers.gptq(weight[:, :64], parse_format("uint4_g32"), moments[:64, :64].clone())
_, grown = peak(lambda: quantizers.gptq(weight, parse_format("uint4_g32"), moments))
print(json.dumps([grown, moments.nbytes, weight.nbytes]))
"""
    grown, moments, weight = run(script, "w8a8")
    assert grown < 0.5 * moments + 6 * weight, f"{grown / moments:.2f} of the moments"
