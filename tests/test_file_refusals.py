"""What load and save refuse, what they leave alone then, and the file itself."""

import json
import os
import stat

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from attacks import File, Net, packed_net
from files import Holder, contents, identities, packed_linear, saved
from torch import nn

import pyengine as pe
from pyengine.container import MAX_HEADER

pytestmark = pytest.mark.usefixtures("quiet")


# ---- failures change nothing -----------------------------------------------------------------------------


class Once(Exception):
    pass


def test_a_load_that_is_interrupted_while_it_hangs_things_in_changes_nothing(path):
    """By Ctrl-C, or by a module that refuses to be changed."""
    pe.save(packed_net(), path)
    for stop in range(14):

        class Stubborn(Net):
            countdown = stop

            def __setattr__(self, name, value):
                if name in ("wide", "odd", "tied", "also", "mask", "ids") and hasattr(self, "ids"):
                    type(self).countdown -= 1
                    if type(self).countdown == -1:
                        raise KeyboardInterrupt
                super().__setattr__(name, value)

        model = Stubborn()
        Stubborn.countdown = stop
        before = identities(model)
        try:
            pe.load(path, model)
        except KeyboardInterrupt:
            assert identities(model) == before
        else:
            assert stop > 5  # every attribute named above was a place to stop
            break
    else:
        pytest.fail("the load never came to its end")


def test_a_kernel_that_is_missing_under_strict_rules_changes_nothing(path, monkeypatch):
    pe.save(packed_net(), path)
    monkeypatch.setenv("PYENGINE_STRICT", "1")
    model = Net()
    before = identities(model)
    with pytest.raises(NotImplementedError, match="'odd'"):
        pe.load(path, model)
    assert identities(model) == before


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.register_buffer("more", torch.zeros(1)), "'more' of the model is missing"),
        (lambda m: setattr(m, "norm", nn.BatchNorm1d(4)), "'norm.weight' has shape"),
        (lambda m: setattr(m, "wide", nn.Linear(8, 7, bias=False)), "layer 'wide' .*with bias"),
        (lambda m: setattr(m, "wide", nn.Linear(7, 7)), "layer 'wide' is linear"),
        (lambda m: setattr(m, "wide", nn.Conv1d(8, 7, 1)), "layer 'wide' is linear .*Conv1d"),
        (lambda m: setattr(m, "wide", nn.Identity()), "layer 'wide' is linear .*Identity"),
        (lambda m: delattr(m, "wide"), "layer 'wide' is linear .*no such layer"),
        (lambda m: setattr(m, "wide", nn.Embedding(7, 8)), "layer 'wide' is linear .*Embedding"),
        (lambda m: setattr(m, "wide", type("Mine", (nn.Linear,), {})(8, 7)), "layer 'wide' is linear .*Mine"),
        (lambda m: setattr(m, "norm", packed_linear(3, 3)), "'norm' is packed in the model"),
        (lambda m: delattr(m, "mask"), "'mask' of the file has no place"),
        (lambda m: setattr(m, "ids", torch.zeros(3)), "'ids' is torch.int64, the model's torch.float32"),
    ],
)
def test_a_model_that_does_not_fit_is_named_and_left_alone(path, change, problem):
    pe.save(packed_net(), path)
    model = Net()
    change(model)
    before = identities(model)
    with pytest.raises(pe.FormatError, match=problem) as caught:
        pe.load(path, model)
    assert str(path) in str(caught.value)
    assert identities(model) == before


@pytest.mark.parametrize("made", [None, 3, {}, torch.zeros(1)])
def test_a_factory_that_makes_no_module_is_a_type_error(path, made):
    pe.save(packed_net(), path)
    with pytest.raises(TypeError, match="the factory made a"):
        pe.load(path, lambda: made)
    with pytest.raises(TypeError, match="the factory made a"):
        pe.load(path, lambda: torch.ones(1).item() and made)


def test_an_error_of_the_factory_itself_is_not_hidden(path):
    pe.save(packed_net(), path)

    def make():
        raise Once("mine")

    with pytest.raises(Once, match="mine"):
        pe.load(path, make)


# ---- what save refuses -----------------------------------------------------------------------------------


class WithExtraState(nn.Module):
    def get_extra_state(self):
        return {"a": 1}


REFUSED = {
    "extra_state": (lambda: Holder(x=WithExtraState()), TypeError, "'x._extra_state' is neither"),
    "meta": (lambda: Holder(x=nn.Parameter(torch.zeros(2, device="meta"))), ValueError, "'x' .*meta device"),
    "meta_layer": (lambda: Holder(fc=packed_linear(3, 2)).to("meta"), ValueError, "'fc.qdata' .*meta device"),
    "more_in_a_layer": (lambda: Holder(fc=with_gain()), TypeError, "'fc' has 'gain'"),
    "sparse": (lambda: Holder(x=torch.eye(3).to_sparse()), TypeError, "'x' is a torch.sparse_coo"),
    "lazy": (lambda: Holder(fc=nn.LazyLinear(3)), TypeError, "'fc.weight' is a UninitializedParameter"),
    "complex128": (lambda: Holder(x=torch.zeros(1).cdouble()), TypeError, "'x' is torch.complex128"),
    "a_layer_alone": (lambda: packed_linear(3, 2), ValueError, "the model is itself a packed layer"),
    "padding_idx": (lambda: Holder(e=padded_beyond()), ValueError, "'e': padding_idx is out of range"),
    "name": (lambda: Holder(__metadata__=torch.zeros(1)), ValueError, "cannot be named '__metadata__'"),
}


def padded_beyond():
    return pe.nn.Embedding(packed_linear(4, 4).packed(), padding_idx=9)


def with_gain():
    layer = packed_linear(3, 2)
    layer.register_buffer("gain", torch.ones(1))
    return layer


@pytest.mark.parametrize(("make", "error", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_a_file_cannot_hold_is_refused_by_name(tmp_path, make, error, problem):
    path = tmp_path / "old"
    path.write_bytes(b"old")
    with pytest.raises(error, match=problem):
        pe.save(make(), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["old"]


def test_a_file_that_could_not_be_read_is_not_written(path, monkeypatch):
    monkeypatch.setattr("pyengine.container.MAX_HEADER", 2000)
    model = Holder(**{f"b{i}": torch.zeros(1) for i in range(100)})
    with pytest.raises(ValueError, match=r"100 tensors make a header of .* bytes, above 2000"):
        pe.save(model, path)
    assert MAX_HEADER >= 100_000 * 150


# ---- paths -----------------------------------------------------------------------------------------------


def test_strings_paths_and_relative_paths_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = packed_net()
    for target in ("a", tmp_path / "b", str(tmp_path / "c"), os.path.join("..", tmp_path.name, "d")):
        pe.save(model, target)
        assert contents(pe.load(target, Net)) == contents(model)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c", "d"]


def test_the_longest_name_that_the_file_system_allows_works(tmp_path):
    path = tmp_path / ("n" * 255)
    pe.save(packed_net(), path)
    pe.save(packed_net(), path)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("dangling", [False, True])
def test_where_the_path_is_a_link_its_target_is_replaced(tmp_path, dangling):
    (tmp_path / "deep").mkdir()
    target, link = tmp_path / "deep" / "target", tmp_path / "link"
    link.symlink_to(os.path.join("deep", "target"))
    if not dangling:
        target.write_bytes(b"old")
    pe.save(packed_net(), link)
    assert link.is_symlink()
    assert not target.is_symlink()
    assert contents(pe.load(link, Net)) == contents(packed_net())


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_of_a_new_file_follow_the_umask_and_those_of_an_old_one_are_kept(path, umask):
    before = os.umask(umask)
    try:
        pe.save(packed_net(), path)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o666 & ~umask
        os.chmod(path, 0o640)
        pe.save(packed_net(), path)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
    finally:
        os.umask(before)


def test_saving_into_a_missing_directory_names_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        pe.save(packed_net(), tmp_path / "missing" / "x")
    assert caught.value.filename == str(tmp_path / "missing")


def test_saving_onto_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match="Not a regular file"):
            pe.save(packed_net(), tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


# ---- the file --------------------------------------------------------------------------------------------


def test_the_file_is_one_that_safetensors_reads(path):
    model = saved(packed_net(), path)
    state = {**model.state_dict(), "ids": model.ids}
    read = safetensors.torch.load_file(path)
    assert read.keys() == state.keys() - {"also", *(k for k in state if k.startswith("again."))}
    for name, tensor in read.items():
        assert tensor.equal(state[name])
        assert tensor.dtype == state[name].dtype
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata()["format"] == "pt"
        np.testing.assert_array_equal(file.get_tensor("norm.weight"), model.norm.weight.detach().numpy())


def test_every_tensor_is_aligned_to_its_type(path):
    """Then a reader may use the bytes where they lie."""
    model = Holder(a=torch.zeros(3, dtype=torch.uint8), b=torch.zeros(1).double(), c=torch.zeros(5).half())
    for name in ("", "x", "xyz"):
        pe.save(Holder(part=nn.ModuleDict({f"n{name}": model})), path)
        content = path.read_bytes()
        assert int.from_bytes(content[:8], "little") % 8 == 0
        for key, entry in File.of(content).header.items():
            if key != "__metadata__":
                width = {"U8": 1, "F16": 2, "F64": 8}[entry["dtype"]]
                assert entry["data_offsets"][0] % width == 0


def test_describe_tells_what_is_in_a_file(path):
    model = saved(packed_net(), path)
    shown = pe.io.describe(str(path))
    assert json.loads(json.dumps(shown)) == shown
    assert shown["bytes"] == path.stat().st_size
    assert shown["intact"]
    assert shown["aliases"] == {"again": "odd", "also": "tied"}
    layers = {layer.pop("name"): layer for layer in shown["layers"]}
    assert layers.keys() == {"emb", "wide", "odd"}
    weight = model.wide.packed()
    assert layers["wide"] == {
        "op": "linear",
        "format": "int8",
        "activations": "a8",
        "shape": [7, 8],
        "dtype": "float32",
        "bytes": weight.nbytes + 28,
        "crc32": layers["wide"]["crc32"],
        "intact": True,
    }
    assert shown["rest"]["tensors"] == 8
    tensors = sum(t.nbytes for t in safetensors.torch.load_file(path).values())
    assert sum(layer["bytes"] for layer in layers.values()) + shown["rest"]["bytes"] == tensors


def test_describe_finds_the_layer_that_is_damaged(path):
    pe.save(packed_net(), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of wide.qdata, the last in the file
    path.write_bytes(content)
    shown = pe.io.describe(path)
    assert {layer["name"]: layer["intact"] for layer in shown["layers"]} == {
        "emb": True,
        "wide": False,
        "odd": True,
    }
    assert not shown["intact"]
    assert shown["rest"]["intact"]


def transformer(depth, prefix):
    """Names as they are in BERT, one projection shared by all layers, a volatile buffer in each."""
    shared = packed_linear(4, 4, "w4_g32_asym")
    model = nn.Module()
    parts = ("attention.self.query", "attention.self.key", "attention.output.dense", "intermediate.dense")
    for i in range(depth):
        for part in (*parts, "shared"):
            *path, last = f"{prefix}.{i}.{part}".split(".")
            place = model
            for key in path:
                if key not in place._modules:
                    place.add_module(key, nn.Module())
                place = place._modules[key]
            place.add_module(last, shared if part == "shared" else packed_linear(4, 4, "w4_g32_asym"))
        place.register_buffer("position_ids", torch.zeros(1), persistent=False)
    return model


@pytest.mark.parametrize(
    "prefix", ["encoder.layer", "bert.encoder.layer", "model.language_model.decoder.layers"]
)
@pytest.mark.parametrize("depth", [0, 1, 100])
def test_the_manifest_takes_at_most_1_KB_and_200_bytes_for_each_layer(path, depth, prefix):
    model = transformer(depth, prefix)
    pe.save(model, path)
    header = File.of(path.read_bytes()).header
    layers = sum(isinstance(m, pe.nn.Linear) for _, m in model.named_modules(remove_duplicate=False))
    # As it stands in the file: quotes within the string of the header take two bytes.
    size = len(json.dumps(header["__metadata__"], separators=(",", ":")))
    assert size <= 1024 + 200 * layers, f"{(size - 1024) / max(layers, 1):.0f} bytes a layer"
