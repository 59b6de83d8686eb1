"""The timestep of the running forward pass, for layers deep inside a host that is not changed.

BI-DiffSR's timestep-aware layers need the diffusion timestep, but a U-Net passes it only to its time embedding. All
layers of a model share one `TimestepContext`: a forward pre-hook stores the timestep, layers read it, a forward hook
clears it. The hooks are bound methods, so that a deepcopy of the model gets a context of its own.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from binarize.errors import BinarizeError

_NAMES = "timestep timesteps t time time_step time_steps noise_level noise_labels sigma"
TIMESTEP_NAMES = tuple(_NAMES.split())


def timestep_group(timesteps: Tensor, groups: int, num_train_timesteps: int) -> Tensor:
    """Return the group of each timestep, ``clamp(floor(t * K / T), 0, K - 1)`` (BI-DiffSR, section 3.4).

    Args:
        timesteps: ``(B,)`` or scalar, integer or floating point, in steps of the training schedule.
        groups: K, the number of groups.
        num_train_timesteps: T.

    Returns:
        ``(B,)`` or ``(1,)`` int64, without synchronization with the device.
    """
    t = timesteps.reshape(-1)
    if t.is_floating_point():
        group = torch.floor(t.to(torch.float32) * groups / num_train_timesteps).long()
    else:
        group = torch.div(t.long() * groups, num_train_timesteps, rounding_mode="floor")
    return group.clamp(0, groups - 1)


class TimestepContext:
    """The timestep of the running forward pass, shared by a model's timestep-aware layers.

    Threads that share a model share its context, so only one of them can run it at a time.
    """

    def __init__(self, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps
        self._timesteps: Tensor | None = None
        self._groups: dict[int, Tensor] = {}

    def set(self, timesteps: Tensor | float | int) -> None:
        """Store the timesteps, ``(B,)`` or scalar, until `clear`."""
        self._timesteps = timesteps if isinstance(timesteps, Tensor) else torch.as_tensor(timesteps)
        self._groups = {}

    def clear(self) -> None:
        """Remove the timesteps, so that a layer that runs outside a forward raises an error."""
        self._timesteps, self._groups = None, {}

    def group(self, groups: int) -> Tensor:
        """Return the group of each sample, ``(B,)`` or ``(1,)`` int64, for K = ``groups``."""
        if self._timesteps is None:
            raise BinarizeError(
                "a timestep-aware layer ran outside a forward of its model; call the converted model itself, or wrap "
                "the call in `with binarize.timesteps(model, t):`. In a torch.utils.checkpoint call of your own, pass "
                "context_fn=binarize.checkpoint_context(model)."
            )
        if groups not in self._groups:
            self._groups[groups] = timestep_group(self._timesteps, groups, self.num_train_timesteps)
        return self._groups[groups]

    @contextmanager
    def using(self, timesteps: Tensor | float | int | None) -> Iterator[None]:
        """Set the timesteps within a ``with`` block and restore the previous ones afterwards; None changes nothing."""
        before, groups = self._timesteps, self._groups
        if timesteps is not None:
            self.set(timesteps)
        try:
            yield
        finally:
            self._timesteps, self._groups = before, groups

    def checkpoint_context(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the two context managers of torch.utils.checkpoint's ``context_fn``: forward and recomputation."""
        return nullcontext(), self.using(self._timesteps)

    def attach(self, model: nn.Module) -> None:
        """Add hooks to ``model`` that read the timestep."""
        time_proj = getattr(model, "time_proj", None)
        if isinstance(time_proj, nn.Module):
            model.register_forward_pre_hook(self._start)
            time_proj.register_forward_pre_hook(self._read_projection)
        else:
            found = timestep_argument(model)
            if found is None:
                raise BinarizeError(no_timestep_message(model))
            self._argument = found
            model.register_forward_pre_hook(self._read_argument, with_kwargs=True)
        model.register_forward_hook(self._forget, always_call=True)
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.register_forward_pre_hook(self._guard_checkpointing)

    def _start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.clear()

    def _read_projection(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._timesteps is None:  # class_embed_type="timestep" of diffusers projects the class labels afterwards
            self.set(args[0])

    def _read_argument(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, position = self._argument
        if name in kwargs:
            self.set(kwargs[name])
        elif position < len(args):
            self.set(args[position])

    def _forget(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.clear()

    def _guard_checkpointing(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # diffusers stores the checkpoint function on each block; recomputation happens after `_forget`.
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, _CheckpointWithTimestep):
            module._gradient_checkpointing_func = _CheckpointWithTimestep(self, function)  # type: ignore[assignment]


class _CheckpointWithTimestep:
    """A checkpoint function whose recomputation uses the timesteps of its forward pass."""

    def __init__(self, context: TimestepContext, function: Callable[..., Any]) -> None:
        self.context, self.function = context, function

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        timesteps = self.context._timesteps

        def run(*inputs: Any) -> Any:
            with self.context.using(timesteps):
                return block(*inputs)

        return self.function(_Callable(run), *args)  # diffusers' own function calls `module.__call__`


class _Callable:
    """Wraps a function so that both ``f(x)`` and ``f.__call__(x)`` are plain bound calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def timestep_argument(model: nn.Module) -> tuple[str, int] | None:
    """Return the name and position of the argument of ``model.forward`` that is the timestep, if there is one."""
    parameters = enumerate(inspect.signature(model.forward).parameters)
    return next(((name, position) for position, name in parameters if name in TIMESTEP_NAMES), None)


def has_timestep(model: nn.Module) -> bool:
    """Return True if a `TimestepContext` can be attached to ``model``."""
    return isinstance(getattr(model, "time_proj", None), nn.Module) or timestep_argument(model) is not None


def no_timestep_message(model: nn.Module) -> str:
    """Return the error message for a timestep-aware method on a model that has no timestep."""
    return (
        f"{type(model).__name__} has no timestep: it has no `time_proj` module and its forward has none of the "
        f"arguments {', '.join(TIMESTEP_NAMES)}. Use a method that is not timestep-aware, or one group for all: "
        'bidiffsr(groups=1), in a recipe {"name": "bidiffsr", "groups": 1}.'
    )


def detach_contexts(model: nn.Module) -> None:
    """Remove all hooks that `TimestepContext.attach` added to a model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), TimestepContext):
                    del hooks[key]
                    for kind in ("pre_hooks_with_kwargs", "hooks_with_kwargs", "hooks_always_called"):
                        getattr(module, f"_forward_{kind}").pop(key, None)
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, _CheckpointWithTimestep):
            module._gradient_checkpointing_func = function.function  # type: ignore[assignment]
