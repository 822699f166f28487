"""The user's own code: MODULE:NAME, and what it raises."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from torch import nn


class UserCodeError(Exception):
    """The user's code raised; the message says what and where."""


def make_model(spec: str) -> nn.Module:
    """MODULE:FACTORY -> the model that FACTORY() returns, in eval mode.

    This runs the user's code. The current directory comes before the Python path. Raises ValueError or
    TypeError if there is no such function or it makes no model, UserCodeError if the code itself raises.
    """
    factory = _look_up(spec, "MODULE:FACTORY")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(f"{spec} is a {type(factory).__name__}, not a function that makes a model")
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise _user_error(error) from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"{spec} made a {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def calibration_batches(spec: str) -> Any:
    """MODULE:ITERABLE -> the iterable of batches, or what it returns if it is a function. As make_model."""
    batches = _look_up(spec, "MODULE:ITERABLE")
    if not callable(batches):
        return batches
    try:
        return batches()
    except (Exception, SystemExit) as error:
        raise _user_error(error) from error


def _look_up(spec: str, form: str) -> Any:
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise ValueError(f"{spec!r} is not of the form {form}")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"no module {error.name!r} in this directory or on the Python path") from None
        raise _user_error(error) from error
    except (Exception, SystemExit) as error:
        raise _user_error(error) from error
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    if found is None:
        raise ValueError(f"module {module_name!r} has no {path!r}")
    return found


def _user_error(error: BaseException) -> UserCodeError:
    """Type, message, and the innermost line in a file of the current directory, else the innermost of all."""
    here = Path.cwd()
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename is not None:
        frames.append((error.filename, error.lineno))
    own = [f for f in frames if Path(f[0]).is_relative_to(here) and "site-packages" not in Path(f[0]).parts]
    file, line = (own or frames)[-1]
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return UserCodeError(f"{type(error).__name__}: {message} ({file}:{line})")


def load_weights(model: nn.Module, path: str) -> None:
    """Fill the model with float weights from a safetensors file. Raises ValueError unless all names match."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    if not os.path.isfile(path):
        raise FileNotFoundError(2, "No such file", path)
    try:
        missing, unexpected = load_model(model, path, strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from None
    for keys, what in ((missing, "lacks"), (unexpected, "has, but the model has not,")):
        if keys:
            some = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ValueError(f"{path} {what} {some}")
