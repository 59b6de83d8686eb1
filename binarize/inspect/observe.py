"""Running a model under hooks and restoring it, and finding modules and binary layers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from binarize.conversion.export import binary_layers
from binarize.conversion.packing import is_packed
from binarize.errors import BinarizeError, did_you_mean
from binarize.layers import BinaryLayer
from binarize.modules import matches

Run = Callable[[], object] | Tensor | Sequence[Any] | Mapping[str, Any]
"""How to run the model: a function without arguments that calls it any number of times (a pipeline, a loop over
timesteps), or the inputs of one forward: a tensor, a tuple of arguments or a mapping of keyword arguments."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@contextmanager
def observing(model: nn.Module) -> Iterator[ExitStack]:
    """Put a model into evaluation mode without gradients; close the contexts entered into the stack at the end."""
    _refuse_packed(model)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with ExitStack() as undo, torch.no_grad():
            model.eval()
            yield undo
    finally:
        for module, training in modes:
            module.training = training


def execute(model: nn.Module, run: Run) -> None:
    """Run the model."""
    if isinstance(run, Tensor):
        model(run)
    elif isinstance(run, Mapping):
        model(**run)
    elif isinstance(run, Sequence) and not isinstance(run, str):
        model(*run)
    elif callable(run):
        run()
    else:
        allowed = "a function without arguments that calls the model, or a tensor, a tuple or a mapping of inputs"
        raise BinarizeError(f"run must be {allowed}; got {run!r}.")


def not_called(name: str) -> BinarizeError:
    """Return the error for a module that the run did not call."""
    fix = "a run must call the inspected model (a pipeline's own network is pipe.unet) and, by it, the module."
    return BinarizeError(f"the run did not call {name!r}, so there is nothing to show; {fix}")


def find_module(model: nn.Module, name: str, kind: type[ModuleT]) -> ModuleT:
    """Return a module of a model by its path and kind."""
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, kind)}
    if name in modules:
        return modules[name]
    what = f"module {name!r}" if kind is nn.Module else f"{kind.__name__} {name!r}"
    paths = [path for path in modules if path]
    shown = ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
    raise BinarizeError(f"{type(model).__name__} has no {what}; it has {shown or 'none'}.{did_you_mean(name, paths)}")


def select_layers(model: nn.Module, patterns: str | Sequence[str] | None) -> list[tuple[str, BinaryLayer]]:
    """Return the binary layers whose name, or the name of a module around them, matches a pattern; all without one."""
    _refuse_packed(model)
    layers = list(binary_layers(model))
    if not layers:
        name = type(model).__name__
        raise BinarizeError(f"this {name} has no binary layer; call binarize.convert(model, method) first.")
    if patterns is None:
        return layers
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        if not any(matches(pattern, name) for name, _ in layers):
            like = ", ".join(name for name, _ in layers[:3])
            raise BinarizeError(f"the pattern {pattern!r} matches no binary layer; names look like {like}.")
    return [(name, layer) for name, layer in layers if any(matches(pattern, name) for pattern in patterns)]


def _refuse_packed(model: nn.Module) -> None:
    if is_packed(model):
        raise BinarizeError("inspect: this model is packed; use binarize.unpack(copy.deepcopy(model)), or pack=False.")
