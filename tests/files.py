"""What the tests of files share: models in pieces, and what of a model a file has to bring back."""

import torch
from torch import nn

import pyengine as pe


def packed_linear(n, k, scheme="w8", **kwargs):
    return pe.nn.Linear.from_float(nn.Linear(k, n, **kwargs), scheme)


def quantized(make, scheme="w8a8"):
    """A model of that make with packed layers, whatever quantize_ thinks of small ones."""
    model = make().eval()
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, key, pe.nn.Linear.from_float(child, scheme))
            elif type(child) is nn.Embedding:
                setattr(parent, key, pe.nn.Embedding.from_float(child, scheme))
    return model


def saved(model, path):
    pe.save(model, path)
    return model


class Holder(nn.Module):
    """A module that holds what it is given: modules, parameters and buffers, of which some are volatile."""

    def __init__(self, volatile=(), **things):
        super().__init__()
        for name, thing in things.items():
            if isinstance(thing, (nn.Module, nn.Parameter)):
                setattr(self, name, thing)
            else:
                self.register_buffer(name, thing, persistent=name not in volatile)


def contents(model):
    """All that a file says of a model: values, types, formats, ties."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        plain = tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
        places[name] = str(tensor.dtype), tuple(tensor.shape), bytes(plain.numpy()), id(tensor)
    ids = [place[-1] for place in places.values()]
    packed = {
        name: (m.op, m.format, m.input_spec, m.prepared.shape, m.dtype, getattr(m, "padding_idx", None))
        for name, m in modules.items()
        if hasattr(m, "layout")
    }
    ties = [ids.index(i) for i in ids], [list(modules.values()).index(m) for m in modules.values()]
    return {name: place[:3] for name, place in places.items()}, packed, ties


def identities(model):
    """What may not change when a load fails: the very objects that the model holds, and their values."""
    held = [*model.modules(), *model.parameters(), *model.buffers()]
    return [id(x) for x in held], contents(model), [*model.__dict__]
