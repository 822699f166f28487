"""Files that lie: each gives a FormatError that names the problem, leaves the model alone and allocates
nothing large. The attacks are rows in attacks/table.py."""

import contextlib
import json
import logging
import os
import random
import re
import socket
import struct
import subprocess
import sys

import pytest
import torch
from attacks import SCHEME, File, Net, assemble, packed_net
from attacks.table import ATTACKS
from files import contents, identities
from hypothesis import given, settings
from hypothesis import strategies as st

import pyengine as pe
from pyengine.container import MAX_HEADER

CASES = [pytest.param(build, problem, id=name) for name, build, problem in ATTACKS]


@pytest.fixture(autouse=True)
def quiet():
    """Loading warns of each layer without a fast kernel; thousands of times here."""
    logging.getLogger("pyengine").setLevel(logging.ERROR)
    yield
    logging.getLogger("pyengine").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def net():
    return packed_net()


@pytest.fixture(scope="module")
def content(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("valid") / "net.safetensors"
    pe.save(net, path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "attack.safetensors"


def refused(path, model_or_factory, **kwargs):
    """The message of the FormatError that load raises, without the path it starts with."""
    with pytest.raises(pe.FormatError) as caught:
        pe.load(path, model_or_factory, **kwargs)
    assert str(caught.value).startswith(f"'{path}': ")
    return str(caught.value).removeprefix(f"'{path}': ")


def test_the_file_that_the_attacks_start_from_loads(net, content, path):
    path.write_bytes(content)
    assert contents(pe.load(path, Net)) == contents(net)
    # Taken apart and put together again with other white space, it is the same model still.
    file = File.of(content)
    file.seal()
    path.write_bytes(file.build())
    assert contents(pe.load(path, Net)) == contents(net)


@pytest.mark.parametrize(("build", "problem"), CASES)
def test_an_attack_is_refused_and_named(content, path, build, problem):
    path.write_bytes(build(File.of(content)))
    for model in (Net(), packed_net(seed=1)):
        before = identities(model)
        message = refused(path, model)
        assert identities(model) == before
        assert re.search(problem, message, re.DOTALL), message
        assert len(message) < 500
        assert message.isprintable()
    assert refused(path, Net)
    assert refused(path, Net, mmap=False)


@pytest.mark.parametrize(("build", "problem"), CASES)
def test_describe_shows_an_attack_or_refuses_it(content, path, build, problem):
    path.write_bytes(build(File.of(content)))
    with contextlib.suppress(pe.FormatError):
        json.dumps(pe.io.describe(path))


def test_an_attack_allocates_nothing_large(content, tmp_path):
    """With 32 MB of address space left, every attack still ends in a FormatError. The largest has 1 MB."""
    for name, build, _ in ATTACKS:
        (tmp_path / name).write_bytes(build(File.of(content)))
    (tmp_path / "valid").write_bytes(content)
    script = """
import logging, os, resource, sys
sys.path.insert(0, sys.argv[2])
import pyengine as pe
from attacks import Net
logging.disable(logging.ERROR)
folder = sys.argv[1]
pe.load(os.path.join(folder, "valid"), Net)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)
try:
    bytearray(64 << 20)
except MemoryError:
    pass
else:
    raise AssertionError("the limit does not hold")
for name in sorted(set(os.listdir(folder)) - {"valid"}):
    for work in (lambda p: pe.load(p, Net), lambda p: pe.load(p, Net()), pe.io.describe):
        try:
            work(os.path.join(folder, name))
        except pe.FormatError:
            continue
        assert work is pe.io.describe, name
pe.load(os.path.join(folder, "valid"), Net)
"""
    run(script, tmp_path, os.path.dirname(__file__))


def run(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_header_above_the_limit_is_not_read(path):
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(1 << 33)  # 8 GB of nothing
    assert "exceeds the limit" in refused(path, Net)


@pytest.mark.parametrize("unit", [b"[],", b"{},"])
def test_a_hostile_header_takes_no_more_memory_than_stated(path, unit):
    """Nothing, many times, is the worst that can be parsed: up to 30 times its size, as container.py says."""
    size = 2 << 20
    path.write_bytes(assemble(b"[" + unit * (size // len(unit)) + b"0]"))
    script = """
import re, sys
import pyengine as pe
def rss(key):
    return 1024 * int(re.search(key + r":\\s*(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")
before = rss("VmRSS")
try:
    pe.load(sys.argv[1], lambda: None)
except pe.FormatError:
    print(rss("VmHWM") - before)
"""
    assert int(run(script, path)) < 30 * size


def test_every_truncation_is_refused(content, path):
    model = Net()
    before = identities(model)
    path.write_bytes(content)
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        with pytest.raises(pe.FormatError, match=r"too short|truncated"):
            pe.load(path, model)
    assert identities(model) == before


@pytest.mark.parametrize("extra", [b"\0", b" " * 8, b"}" * 4096])
def test_an_extended_file_is_refused(content, path, extra):
    path.write_bytes(content + extra)
    assert "extended" in refused(path, Net)


def test_a_file_appended_to_itself_is_refused(content, path):
    path.write_bytes(content * 2)
    assert "extended" in refused(path, Net)


def load_or_refuse(path, content, expected):
    """True if the content loads, which it may only do as the original model."""
    path.write_bytes(content)
    try:
        model = pe.load(path, Net())
    except pe.FormatError:
        return False
    assert contents(model) == expected
    return True


def test_no_byte_can_change_the_model_unseen(net, content, path):
    expected, harmless = contents(net), 0
    for position, byte in enumerate(content):
        for other in (byte ^ (1 << position % 8), ord("1") if byte != ord("1") else ord("2")):
            if other != byte:
                changed = content[:position] + bytes([other]) + content[position + 1 :]
                harmless += load_or_refuse(path, changed, expected)
    # The entry "format" of the metadata, which other libraries read, is all that may change.
    assert 0 < harmless < 3 * len('"format":"pt"')


def test_no_two_swapped_bytes_can_change_the_model_unseen(net, content, path):
    """Neighbours in the data, which a sum of bytes would not tell apart."""
    expected = contents(net)
    for position in range(len(content) - 300, len(content) - 1):
        a, b = content[position : position + 2]
        if a != b:
            changed = content[:position] + bytes([b, a]) + content[position + 2 :]
            assert not load_or_refuse(path, changed, expected)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "copy"]),
        st.integers(0, 1 << 16),
        st.integers(0, 1 << 16),
        st.binary(min_size=1, max_size=12)
        | st.sampled_from([b'"', b"}", b",", b"0", b"9" * 30, b"null", b'":{"']),
    ),
    min_size=1,
    max_size=6,
)


def edited(content, edits):
    for kind, a, b, piece in edits:
        a %= max(len(content), 1)
        b = a + b % 32
        if kind == "set":
            content = content[:a] + piece + content[a + len(piece) :]
        elif kind == "insert":
            content = content[:a] + piece + content[a:]
        elif kind == "delete":
            content = content[:a] + content[b:]
        else:
            content = content[:a] + content[a:b] + content[a:]
    return content


@settings(max_examples=600)
@given(edits=EDITS)
def test_random_edits_only_raise_format_errors(tmp_path_factory, net, content, edits):
    path = tmp_path_factory.getbasetemp() / "edited.safetensors"
    load_or_refuse(path, edited(content, edits), contents(net))


@settings(max_examples=600)
@given(edits=EDITS, part=st.sampled_from(["manifest", "header", "data"]))
def test_random_edits_of_one_part_with_right_sums_only_raise_format_errors(
    tmp_path_factory, content, edits, part
):
    """The other sums made right, so that the edits get deeper: the file may be that of another model then."""
    file = File.of(content)
    if part == "manifest":
        file.manifest_text = edited(file.manifest_text.encode(), edits).decode("latin-1")
        changed = file.build()
    elif part == "header":
        header = edited(json.dumps(file.header).encode(), edits)
        changed = assemble(header, file.data)
    else:
        file.data = (edited(file.data, edits) + bytes(len(file.data)))[: len(file.data)]
        file.seal()
        changed = file.build()
    path = tmp_path_factory.getbasetemp() / "edited.safetensors"
    path.write_bytes(changed)
    for work in (lambda: pe.load(path, Net()), lambda: pe.load(path, Net), lambda: pe.io.describe(path)):
        with contextlib.suppress(pe.FormatError):
            work()


LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(["", "odd"])
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["odd", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=600)
@given(value=JSON, seed=st.integers(0, 2**32))
def test_any_json_anywhere_in_manifest_and_header_only_raises_format_errors(
    tmp_path_factory, content, value, seed
):
    file, chooser = File.of(content), random.Random(seed)
    manifest = file.manifest
    node = root = chooser.choice([manifest, file.header])
    while True:
        key = chooser.choice(list(node)) if isinstance(node, dict) else chooser.randrange(len(node))
        if not isinstance(node[key], (dict, list)) or not node[key] or chooser.random() < 0.3:
            break
        node = node[key]
    node[key] = value
    if root is manifest:
        file.manifest = manifest
    path = tmp_path_factory.getbasetemp() / "edited.safetensors"
    path.write_bytes(file.build())
    for work in (lambda: pe.load(path, Net()), lambda: pe.io.describe(path)):
        with contextlib.suppress(pe.FormatError):
            work()


def test_a_newer_minor_version_with_unknown_fields_is_read(net, content, path):
    file = File.of(content)
    manifest = file.manifest
    manifest["version"] = [1, 999]
    manifest["later"] = {"x": [1, {}]}
    manifest["layers"]["wide"]["later"] = None
    file.manifest = manifest
    path.write_bytes(file.build())
    assert contents(pe.load(path, Net)) == contents(net)
    assert pe.io.describe(path)["version"] == [1, 999]


def test_layers_do_not_change_with_the_file_once_they_are_loaded(net, content, path):
    """What was checked is what runs: another process may write into the file, kernels trust their weights."""
    path.write_bytes(content)
    model = pe.load(path, Net)
    with open(path, "r+b") as file:
        file.write(b"\xff" * len(content))
    for name in SCHEME:
        assert model.get_submodule(name).layout.equal(net.get_submodule(name).layout)


def test_a_file_of_another_model_names_the_layer(content, path):
    path.write_bytes(content)

    class Other(Net):
        def __init__(self):
            super().__init__()
            self.wide = torch.nn.Linear(9, 7)

    assert refused(path, Other) == r"layer 'wide' is linear (7, 8) in the file, Linear (7, 9) in the model"


@pytest.mark.parametrize("work", [lambda path: pe.load(path, Net), pe.io.describe], ids=["load", "describe"])
class TestWhatIsNotAFile:
    def test_a_directory(self, work, tmp_path):
        with pytest.raises(pe.FormatError, match="not a regular file"):
            work(tmp_path)

    def test_a_pipe_without_a_writer_does_not_hang(self, work, path):
        os.mkfifo(path)
        with pytest.raises(pe.FormatError, match="not a regular file"):
            work(path)

    @pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
    def test_a_device(self, work, device):
        with pytest.raises(pe.FormatError, match="not a regular file"):
            work(device)

    def test_a_socket(self, work, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # the names of sockets must be short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("s")
            with pytest.raises(OSError, match="'s'"):
                work("s")

    def test_a_missing_file_and_a_missing_directory(self, work, path):
        with pytest.raises(FileNotFoundError):
            work(path)
        with pytest.raises(FileNotFoundError):
            work(path / "x")
