"""The timestep of the running forward pass, for layers deep inside a host that is not changed.

BI-DiffSR's timestep-aware layers need the diffusion timestep, but a U-Net passes it only to its time embedding. All
layers of a model share one `TimestepContext`. `TimestepContext.attach` wraps the ``forward`` of this one model, so that
``model(...)`` and ``model.forward(...)`` both provide the timestep, and layers read it. The wrapper and the hooks are
made of bound methods, so that a deepcopy or a pickled copy of the model gets a context of its own.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from binarize.conditioning import BY_STEPS, Timestep
from binarize.errors import BinarizeError
from binarize.timestep_argument import ASSUMED_NAMES, TimestepSource, find_source


class _Pass:
    """The timesteps of one forward pass, or of a ``with`` block."""

    def __init__(self, timesteps: Tensor | None, absent: str = "") -> None:
        self.timesteps, self.absent = timesteps, absent  # ``absent`` says why there are none
        self.groups: dict[int, Tensor] = {}
        self.batch: int | None = None  # of the model's input, if known
        self.projected = False  # whether ``time_proj`` has run


class _Slot(threading.local):
    """What a thread runs. Autograd recomputes checkpointed layers in threads of its own."""

    def __init__(self) -> None:  # runs in each thread
        self.running: _Pass | None = None
        self.called: nn.Module | None = None  # the module whose `__call__` is about to call ``forward``


class TimestepContext:
    """The timestep of the running forward pass, shared by a model's timestep-aware layers; each thread has its own.

    ``timestep`` says where the model's timestep is, and what it means.
    """

    def __init__(self, num_train_timesteps: int, timestep: Timestep = BY_STEPS) -> None:
        self.num_train_timesteps, self.timestep = num_train_timesteps, timestep
        self._source: TimestepSource | None = None  # once attached to a model
        self._warned = False
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_slot", "_blocks", "_checked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._slot = _Slot()
        self._blocks: dict[int, _Pass] = {}  # the running ``with`` block of each thread
        self._checked: tuple[Any, Tensor] | None = None  # a copy of timesteps on its way from a device

    def set(self, timesteps: Tensor | float | int) -> None:
        """Store the timesteps, ``(B,)`` or scalar, until `clear`, for the calling thread."""
        self._slot.running = _Pass(_as_tensor(timesteps))

    def clear(self) -> None:
        """Remove the timesteps, so that a layer that runs outside a forward raises an error."""
        self._slot.running = None

    def group(self, groups: int, batch: int | None = None) -> Tensor:
        """Return the group of each sample, int64, for K = ``groups``.

        Args:
            groups: K.
            batch: N, the batch size of the layer. A network may fold frames or windows into the batch: if N is a
                multiple of the number B of timesteps, sample i gets timestep ``i // (N / B)``.

        Returns:
            ``(1,)`` if there is one timestep, else ``(N,)``; ``(B,)`` without ``batch``.

        Raises:
            BinarizeError: If no forward pass is running, it has no timestep, or N is not a multiple of B.
        """
        running = self._slot.running
        if running is None:
            running = self._block_of_backward()
        if groups not in running.groups:
            if running.timesteps is None:
                raise BinarizeError(running.absent)
            self._check(running.timesteps)
            running.groups[groups] = self.timestep.group(running.timesteps, groups, self.num_train_timesteps)
        group = running.groups[groups]
        return group if batch is None else repeat_for(batch, group)

    def _block_of_backward(self) -> _Pass:
        """Return the timesteps that a ``with`` block of another thread gives to the backward pass that runs here."""
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and len(self._blocks) == 1:
            return next(iter(self._blocks.values()))
        if in_backward and self._blocks:
            raise BinarizeError(
                f"{len(self._blocks)} threads run binarize.timesteps(...) for one model, so its backward pass cannot "
                "tell which timesteps to recompute with; run one backward pass at a time."
            )
        if in_backward:
            raise BinarizeError(
                "a timestep-aware layer was recomputed in the backward pass, where the timestep is gone. Call it as "
                "`with binarize.timesteps(model, t): loss.backward()`, or pass "
                "context_fn=binarize.checkpoint_context(model) to a torch.utils.checkpoint call of your own with "
                "use_reentrant=False."
            )
        raise BinarizeError(
            "a timestep-aware layer ran outside a forward of its model; call the converted model itself, or wrap the "
            "call in `with binarize.timesteps(model, t):`."
        )

    @contextmanager
    def using(self, timesteps: Tensor | float | int | None) -> Iterator[None]:
        """Set the timesteps within a ``with`` block and restore the previous ones afterwards; None changes nothing."""
        if timesteps is None:
            yield
            return
        block, thread = _Pass(_as_tensor(timesteps)), threading.get_ident()
        outer, self._blocks[thread] = self._blocks.get(thread), block
        try:
            with self._running(block):
                yield
        finally:
            if outer is None:
                del self._blocks[thread]
            else:
                self._blocks[thread] = outer

    @contextmanager
    def _running(self, forward_pass: _Pass | None) -> Iterator[None]:
        before, self._slot.running = self._slot.running, forward_pass
        try:
            yield
        finally:
            self._slot.running = before

    def checkpoint_context(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the two context managers of torch.utils.checkpoint's ``context_fn``: forward and recomputation."""
        return nullcontext(), self._running(self._slot.running)

    def check(self, model: nn.Module) -> None:
        """Raise BinarizeError if the model has no such timestep."""
        find_source(model, self.timestep)

    def attach(self, model: nn.Module) -> None:
        """Wrap the model's ``forward`` so that it provides the timestep."""
        self._source = source = find_source(model, self.timestep)
        self._name = type(model).__name__
        original = model.forward
        forward: Any = functools.partial(_run_pass, self, original)
        forward.__wrapped__ = original  # inspect.signature looks there
        model.forward = forward
        model.register_forward_pre_hook(self._note_call)
        if source.projection is not None:
            source.projection.register_forward_pre_hook(self._read_projection)
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.register_forward_pre_hook(self._guard_checkpointing)

    def _note_call(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._slot.called = module

    def start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the timestep from the arguments of a call of the model's ``forward``."""
        value, absent = cast(TimestepSource, self._source).read(args, kwargs)
        fix = "pass it, or say with binarize.convert(..., timestep=...) where it is"
        running = _Pass(None, f"{self._name}.forward ran without a timestep: {absent}; {fix}.")
        inputs = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1)
        image = next(inputs, None)
        running.batch = None if image is None else image.shape[0]
        self._slot.running = running
        if value is not None:
            self._take(running, value)
        if hasattr(module, "gradient_checkpointing"):
            self._guard_checkpointing(module, ())

    def _take(self, running: _Pass, value: Any) -> None:
        try:
            timesteps = _as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            running.absent = (
                f"{self._name}.forward got a {type(value).__name__} as timestep; pass a tensor or a number."
            )
            return
        running.timesteps, running.groups = timesteps, {}

    def _check(self, timesteps: Tensor) -> None:
        """Warn once if values do not fit the declared kind of timestep.

        Values on another device are copied asynchronously and checked in a later forward.
        """
        if (
            torch.compiler.is_compiling()
            or self._warned
            or self._source is None
            or torch.jit.is_tracing()
            or timesteps.is_meta
        ):
            return
        with suppress(RuntimeError):  # a fake tensor, or one inside vmap, has no values
            if timesteps.device.type == "cpu":
                self._look_at(timesteps.detach())
            elif not (timesteps.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._look_at_copy(timesteps.detach())

    def _look_at_copy(self, timesteps: Tensor) -> None:
        checked = self._checked
        if checked is None:
            copy, event = timesteps.to("cpu", non_blocking=True), torch.Event(timesteps.device)
            event.record()
            self._checked = event, copy
        elif checked[0].query():
            self._checked = None
            self._look_at(checked[1])

    def _look_at(self, timesteps: Tensor) -> None:
        name = cast(TimestepSource, self._source).name
        whole = self.timestep.argument is None and name in ASSUMED_NAMES
        fault = self.timestep.fault(timesteps, self.num_train_timesteps, whole)
        if fault is None:
            return
        self._warned = True
        where = "`time_proj`" if name is None else f"{name!r}"
        warnings.warn(
            f"{self._name}: the timestep in {where} is read as {self.timestep.kind!r} and was {fault}. Timestep groups "
            "are then not those meant; say what it is when you convert, such as binarize.convert(..., "
            f"timestep=binarize.Timestep({name!r}, 'noise_level')), or set num_train_timesteps.",
            UserWarning,
            stacklevel=2,
        )

    def _read_projection(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        running = self._slot.running
        if running is None or running.projected or not args:
            return
        running.projected = True  # class_embed_type="timestep" of diffusers projects the class labels afterwards
        value = args[0]
        scalar = not isinstance(value, Tensor) or value.dim() == 0
        if scalar or (value.dim() == 1 and (running.batch is None or value.shape[0] in (1, running.batch))):
            self._take(running, value)

    def _guard_checkpointing(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # diffusers stores the checkpoint function on each block; recomputation happens after the forward pass.
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, _CheckpointWithTimestep):
            module._gradient_checkpointing_func = _CheckpointWithTimestep(self, function)  # type: ignore[assignment]


def _run_pass(context: TimestepContext, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run a model's own ``forward`` with its timestep."""
    slot, module = context._slot, getattr(forward, "__self__", None)
    called, before, slot.called = slot.called, slot.running, None
    if called is not None and called is not module and isinstance(forward, MethodType):
        # a replica of nn.DataParallel, which has this wrapper and its own parameters
        module, forward = called, functools.partial(forward.__func__, called)
    try:
        context.start(module, args, kwargs)  # type: ignore[arg-type]
        return forward(*args, **kwargs)
    finally:
        slot.running = before


class _CheckpointWithTimestep:
    """A checkpoint function whose recomputation uses the timesteps of its forward pass."""

    def __init__(self, context: TimestepContext, function: Callable[..., Any]) -> None:
        self.context, self.function = context, function

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        running = self.context._slot.running

        def run(*inputs: Any) -> Any:
            with self.context._running(running):
                return block(*inputs)

        return self.function(_Callable(run), *args)  # diffusers' own function calls `module.__call__`


class _Callable:
    """Wraps a function so that both ``f(x)`` and ``f.__call__(x)`` are plain bound calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def repeat_for(batch: int, values: Tensor) -> Tensor:
    """Repeat the rows of B timesteps, or of one, for a layer whose batch is a multiple of B: row ``i // (batch / B)``.

    Raises:
        BinarizeError: If ``batch`` is not a multiple of B.
    """
    given = values.shape[0]
    if given in (1, batch):
        return values
    if batch % given:
        raise BinarizeError(
            f"a timestep-aware layer got a batch of {batch}, but the forward pass has {given} timesteps; it must be a "
            f"multiple of {given} (sample i of n times as many gets timestep i // n), or there must be one timestep."
        )
    return values.repeat_interleave(batch // given, dim=0)


def _as_tensor(timesteps: Any) -> Tensor:
    return timesteps if isinstance(timesteps, Tensor) else torch.as_tensor(timesteps)


def detach_contexts(model: nn.Module) -> None:
    """Remove what `TimestepContext.attach` added to a model."""
    forward = vars(model).get("forward")
    if isinstance(forward, functools.partial) and forward.func is _run_pass:
        original = forward.args[1]
        del model.forward
        if getattr(original, "__func__", None) is not getattr(model.forward, "__func__", None):
            model.forward = original  # replaced before the conversion
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
