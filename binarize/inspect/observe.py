"""Running a model while hooks look on, and leaving it as it was."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from binarize.conversion.export import binary_layers
from binarize.conversion.packing import is_packed
from binarize.errors import BinarizeError, did_you_mean
from binarize.layers import BinaryConv2d, BinaryLinear

Run = Callable[[], object] | Tensor | Sequence[Any] | Mapping[str, Any]
"""What to observe: a function without arguments that calls the model as often as it likes (a pipeline, a loop over
timesteps), or the inputs of one forward: a tensor, a tuple of arguments or a mapping of keyword arguments."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@contextmanager
def observing(model: nn.Module) -> Iterator[ExitStack]:
    """While entered, the model is in evaluation mode and no gradients are recorded.

    Yields:
        A stack; what is entered into it, such as the handle of a hook, is undone on leaving.

    Raises:
        BinarizeError: If the model is packed.
    """
    _refuse_packed(model)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with ExitStack() as undo, torch.no_grad():
            model.eval()
            yield undo
    finally:
        for module, training in modes:
            module.training = training


def start(model: nn.Module, run: Run) -> None:
    """Run the model.

    Raises:
        BinarizeError: If ``run`` is none of what it may be.
    """
    if isinstance(run, Tensor):
        model(run)
    elif isinstance(run, Mapping):
        model(**run)
    elif isinstance(run, Sequence) and not isinstance(run, str):
        model(*run)
    elif callable(run):
        run()
    else:
        raise BinarizeError(
            f"run must be a function without arguments that calls the model, or the inputs of one forward (a tensor, "
            f"a tuple or a mapping); got {run!r}."
        )


def unreached(name: str) -> BinarizeError:
    """Return the error for a module that the run did not call."""
    return BinarizeError(
        f"the run did not call {name!r}, so there is nothing to show; a run must call the model that is inspected "
        "(a pipeline's own network is pipe.unet), and the module must be part of its forward."
    )


def find_module(model: nn.Module, name: str, kind: type[ModuleT]) -> ModuleT:
    """Return a module of a model by its path.

    Raises:
        BinarizeError: If there is none of that name, or it is of another kind.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    of_kind = [path for path, module in named.items() if path and isinstance(module, kind)]
    found = named.get(name)
    if isinstance(found, kind):
        return found
    what = f"module {name!r}" if kind is nn.Module else f"{kind.__name__} {name!r}"
    shown = ", ".join(of_kind[:4]) + (", ..." if len(of_kind) > 4 else "")
    raise BinarizeError(f"{type(model).__name__} has no {what}; it has {shown or 'none'}.{did_you_mean(name, of_kind)}")


def chosen_layers(
    model: nn.Module, patterns: str | Sequence[str] | None
) -> list[tuple[str, BinaryConv2d | BinaryLinear]]:
    """Return the binary layers that any pattern matches, by itself or by a module around it; all without patterns.

    Raises:
        BinarizeError: If the model is packed, has no binary layer, or a pattern matches none.
    """
    _refuse_packed(model)
    layers = list(binary_layers(model))
    if not layers:
        raise BinarizeError(
            f"this {type(model).__name__} has no binary layer; call binarize.convert(model, method) first."
        )
    if patterns is None:
        return layers
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(_matches(pattern, name) for name, _ in layers):
            raise BinarizeError(
                f"the pattern {pattern!r} matches no binary layer; names look like "
                f"{', '.join(name for name, _ in layers[:3])}."
            )
    return [(name, layer) for name, layer in layers if any(_matches(pattern, name) for pattern in patterns)]


def _refuse_packed(model: nn.Module) -> None:
    if is_packed(model):
        raise BinarizeError(
            "inspect: this model is packed, and its parts no longer run one by one; inspect a copy, "
            "binarize.unpack(copy.deepcopy(model)), or load it with pack=False."
        )


def _matches(pattern: str, name: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
