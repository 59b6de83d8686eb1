"""The record of its conversion that a converted model carries, and what can be asked of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from binarize.conversion.report import ConversionReport
from binarize.errors import BinarizeError
from binarize.methods import Method
from binarize.packed.files import PACKED_FORMAT
from binarize.timestep import TimestepContext

RECORD = "_binarize_conversion"
FORMAT = 1


@dataclass
class Conversion:
    """What `convert` did to a model.

    Attributes:
        method: The method.
        structure: "keep" or "cp_cs".
        keep: Patterns of the layers that the user kept. A predicate is stored as the names that it selected.
        overrides: Pattern to method, or to None for full precision.
        linear: The ``linear`` argument of `convert`.
        num_train_timesteps: T, or None if no layer needs the timestep.
        report: The report.
        context: The timestep context, or None.
        packed: Whether `binarize.pack` has replaced the latent weights by bits.
    """

    method: Method
    structure: str
    keep: list[str]
    overrides: dict[str, Method | None]
    linear: bool | list[str]
    num_train_timesteps: int | None
    report: ConversionReport
    context: TimestepContext | None = None
    packed: bool = False

    def to_config(self) -> dict[str, Any]:
        """Return the arguments with which `convert` repeats this conversion, as plain JSON types.

        Raises:
            BinarizeError: If a part of the method cannot be named in a file.
        """
        config = {
            "format": FORMAT,
            "method": self.method.to_config(),
            "structure": self.structure,
            "keep": list(self.keep),
            "overrides": {k: None if v is None else v.to_config() for k, v in self.overrides.items()},
            "linear": self.linear,
            "num_train_timesteps": self.num_train_timesteps,
        }
        return {**config, "packed": PACKED_FORMAT} if self.packed else config


def conversion(model: nn.Module) -> Conversion:
    """Return the record of a model's conversion.

    Raises:
        BinarizeError: If the model is not converted.
    """
    if not is_converted(model):
        raise BinarizeError(
            f"this {type(model).__name__} is not converted; call binarize.convert(model, method) first."
        )
    return cast(Conversion, getattr(model, RECORD))


def is_converted(model: nn.Module) -> bool:
    """Return True if the model itself carries the record of a conversion."""
    return hasattr(model, RECORD)


def record_config(model: nn.Module, record: Conversion | None) -> None:
    """Store a conversion in the configuration of a host whose constructor has an argument for it (SRUNet)."""
    if not hasattr(model, "register_to_config") or "conversion" not in inspect.signature(type(model)).parameters:
        return
    try:
        config = None if record is None else record.to_config()
    except BinarizeError as error:
        config = {"unsaveable": str(error)}
    cast(Any, model).register_to_config(conversion=config)


def report(model: nn.Module) -> ConversionReport:
    """Return what the conversion did to each module, and why.

    Raises:
        BinarizeError: If the model is not converted.
    """
    return conversion(model).report


def timesteps(model: nn.Module, timestep: Tensor | float | int) -> AbstractContextManager[None]:
    """Return a context manager that sets the timestep, so that parts of a converted model can run on their own.

    Args:
        model: A converted model.
        timestep: Scalar or ``(B,)``.

    Raises:
        BinarizeError: If the model is not converted.
    """
    context = conversion(model).context
    return nullcontext() if context is None else context.using(timestep)


def checkpoint_context(
    model: nn.Module,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Return the ``context_fn`` for your own torch.utils.checkpoint calls inside a converted model.

    The backward pass recomputes activations after the forward pass has cleared the timestep; this restores it. Models
    whose checkpointing is enabled through diffusers do not need it.

    Raises:
        BinarizeError: If the model is not converted.
    """
    context = conversion(model).context
    if context is None:
        return lambda: (nullcontext(), nullcontext())
    return context.checkpoint_context
