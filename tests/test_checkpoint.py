"""Calibration that is interrupted goes on where it stopped, and a checkpoint of something else is refused."""

import copy
import json

import pytest
import torch
from helpers import assert_same_bits
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import pyengine as pe
from pyengine.formats import FormatError
from pyengine.nn.packed_module import PackedModule
from pyengine.passes import checkpoint as module

WIDTH = 64


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 96, bias=False), nn.Linear(WIDTH, 96, bias=False)
        self.down = nn.Linear(96, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def net():
    torch.manual_seed(0)
    model = nn.Sequential(*(Gated() for _ in range(4))).eval()
    with torch.no_grad():
        for block in model:
            block.norm.weight[3::16] += 20
    return model


def batches(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(20, WIDTH, generator=generator) for _ in range(3)]


class Counting:
    """How the model is fed, how often, and after how many times that fails."""

    def __init__(self, last=None):
        self.calls, self.last = 0, last

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.last:
            raise KeyboardInterrupt
        return model(batch)


def run(model, folder, forward=None, **options):
    options = {"method": "gptq", "calibration_data": batches(), **options}
    scheme = options.pop("scheme", "w4_g32_asym")
    return pe.quantize_(model, scheme, checkpoint=folder, forward=forward or Counting(), **options)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert_same_bits(a[name], b[name])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_codes(method, tmp_path):
    whole, counting = net(), Counting()
    report = run(whole, None, counting, method=method)
    assert counting.calls > 15
    folder = tmp_path / "new" / "folder"

    model = net()
    with pytest.raises(KeyboardInterrupt):
        run(model, folder, Counting(last=counting.calls - 4), method=method)
    same_state(model, net())
    kept = len(list(folder.iterdir()))
    assert 0 < kept < len(report.changes)

    again = Counting()
    resumed = run(model, folder, again, method=method)
    assert again.calls <= counting.calls // 2
    same_state(model, whole)
    assert [change.note for change in resumed.changes] == [change.note for change in report.changes]

    third = Counting()
    run(other := net(), folder, third, method=method)
    # To see the order of the calls; and what awq would scale is confirmed on every batch, twice.
    assert third.calls == (7 if method == "awq" else 1)
    same_state(other, whole)


def changed(model):
    with torch.no_grad():
        model[0].gate.weight[0, 0] += 0.01


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({"scheme": "w4_g32"}, None, "another scheme or weight"),
        ({"method": "awq"}, None, "another method"),
        ({"act_order": True}, None, "another act_order"),
        ({"calibration_data": batches(2)}, None, "another data"),
        ({}, changed, "another scheme or weight"),
    ],
    ids=["scheme", "method", "act_order", "data", "weight"],
)
def test_what_was_made_from_something_else_is_refused_and_kept(options, change, reason, tmp_path):
    run(net(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = net()
    if change:
        change(model)
    as_it_was = copy.deepcopy(model)
    with pytest.raises(ValueError, match=rf"layer '\d\.\w+' was quantized with {reason}"):
        run(model, tmp_path, **options)
    same_state(model, as_it_was)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_layer_is_not_taken_for_one_that_is_alike(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].load_state_dict(model[0].state_dict())
    data = [torch.randn(8, 32)]
    run(model, tmp_path, calibration_data=data)
    first, second = sorted(tmp_path.iterdir())
    first.write_bytes(second.read_bytes())
    twin = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.raises(ValueError, match="layer '"):
        run(twin, tmp_path, calibration_data=data)


def rewritten(path, about=None, **tensors):
    """The file with other metadata and tensors, and a checksum that fits them."""
    with safe_open(path, "pt") as file:
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = json.loads(file.metadata()[module.METADATA])
    old.update(tensors)
    old = {name: tensor for name, tensor in old.items() if tensor is not None}
    found["crc32"] = module.checksum(old[name] for name in sorted(old))
    found.update(about or {})
    save_file(old, path, {module.METADATA: json.dumps(found)})


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


ATTACKS = {
    "truncated": (truncated, "truncated"),
    "flipped": (flipped, "checksum"),
    "empty": (lambda path: path.write_bytes(b""), "too short"),
    "format": (lambda path: rewritten(path, {"found": {"3.down": ["int9", ""]}}), "unknown weight format"),
    "no format": (lambda path: rewritten(path, {"found": {"3.down": 7}}), "format and note"),
    "other layers": (lambda path: rewritten(path, {"found": {}}), "other layers"),
    "a scale": (
        lambda path: rewritten(path, **{"3.down.scale": torch.full((64, 3), -1.0).half()}),
        "negative",
    ),
    "missing": (lambda path: rewritten(path, **{"3.down.zero": None}), "missing"),
    "more": (lambda path: rewritten(path, more=torch.zeros(3)), "belongs to no layer"),
    "scales of 0": (lambda path: rewritten(path, scales=torch.zeros(96)), "positive"),
    "too few scales": (lambda path: rewritten(path, scales=torch.ones(4)), "positive"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_damaged_file_is_refused_by_name(attack, tmp_path):
    run(net(), tmp_path, include="3.down")
    (path,) = tmp_path.iterdir()
    change, problem = ATTACKS[attack]
    change(path)
    model = net()
    with pytest.raises(FormatError, match=problem) as raised:
        run(model, tmp_path, include="3.down")
    assert str(path) in str(raised.value)
    assert "layer '3.down'" in str(raised.value)
    assert not isinstance(model[3].down, PackedModule)


def test_the_fingerprint_sees_tensors_in_whatever_holds_them():
    x, y = torch.randn(3), torch.arange(4)
    different = [
        [x],
        [y],
        [(x, y)],
        [[x, y]],
        [{"a": x}],
        [{"b": x}],
        [x, y],
        [x.double()],
        [x.view(1, 3)],
        [],
    ]
    assert len({module.fingerprint(data) for data in different}) == len(different)
    assert module.fingerprint([{"a": x}]) == module.fingerprint([{"a": x.clone()}])
