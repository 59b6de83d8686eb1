"""Packed operators: registered with PyTorch's dispatcher, cheap to call, and without a gradient.

`torch.library.custom_op` asks about gradients and aliases in Python at each call, which takes as long as the kernels of
a small layer. Here a call that nobody wants a gradient of goes past that, and past the dispatcher too where it has
nothing to add: ordinary CPU tensors, and nobody who traces, records or transforms.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from binarize.errors import BinarizeError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_libraries: dict[str, torch.library.Library] = {}  # what they define lives as long as they do


class Operator(Generic[_P, _R]):
    """A function that is an operator of PyTorch's: `torch.export` and `torch.compile` see a call and not its inside.

    Its result refuses to give a gradient, in a backward of any kind.

    Args:
        function: What it does, on any device; it returns new tensors.
        schema: Its arguments and results; taken from annotations if None.

    Attributes:
        overload: What the dispatcher knows it as.
    """

    def __init__(self, function: Callable[_P, _R], schema: str | None = None) -> None:
        self.__doc__, self.name = function.__doc__, f"binarize::{function.__name__}"
        if self.name in _libraries:  # its module is loaded again
            _libraries.pop(self.name)._destroy()
        self._function = function
        self._library = _libraries[self.name] = torch.library.Library("binarize", "FRAGMENT")
        found = schema or torch.library.infer_schema(function, mutates_args=())
        self._library.define(function.__name__ + found, tags=torch.Tag.pt2_compliant_tag)
        self._library.impl(function.__name__, function, "CompositeExplicitAutograd")
        torch.library.register_autograd(self.name, _refuse, lib=self._library)
        self.overload = getattr(torch.ops.binarize, function.__name__).default

    def register_fake(self, function: Callable[_P, Any]) -> Callable[_P, Any]:
        """Say what comes out, from shapes and dtypes alone."""
        torch.library.register_fake(self.name, function, lib=self._library)
        return function

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run the operator."""
        values = (*args, *kwargs.values())
        if goes_straight(*values):
            return self._function(*args, **kwargs)
        if torch.compiler.is_compiling() or _wants_gradient(*values):
            out: _R = self.overload(*args, **kwargs)
            return out
        with torch._C._AutoDispatchBelowAutograd():
            out = self.overload(*args, **kwargs)
            return out


def operator(schema: str | None = None) -> Callable[[Callable[_P, _R]], Operator[_P, _R]]:
    """Return a decorator that makes an `Operator` of a function."""
    return lambda function: Operator(function, schema)


def goes_straight(*values: object) -> bool:
    """Say whether the dispatcher has nothing to add to a call with these arguments.

    That is: all tensors are plain ones on a CPU, none wants a gradient, and no mode, transform, tracer, compiler or
    profiler would see the call. (PyTorch's ExecutionTraceObserver would, and does not.)
    """
    if (
        torch.compiler.is_compiling()
        or not _THREAD_KEYS
        or _keys_of_thread() not in _THREAD_KEYS
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return False
    for value in values:
        if type(value) is Tensor or type(value) is Parameter:
            if _keys_of(value) not in _PLAIN_KEYS or (value.requires_grad and torch.is_grad_enabled()):
                return False
        elif hasattr(type(value), "__torch_function__"):  # tensors of other kinds, and what stands for one
            return False
    return True


def _keys_of_thread() -> int:
    """Return what is switched on in this thread's dispatcher; modes, transforms and tracers have keys there."""
    keys: int = torch._C._dispatch_tls_local_include_set().raw_repr()
    return keys


def _keys_of(tensor: Tensor) -> int:
    keys: int = torch._C._dispatch_keys(tensor).raw_repr()
    return keys


_THREAD_KEYS: set[int] = set()
_PLAIN_KEYS: set[int] = set()


def _look() -> None:
    with suppress(AttributeError):  # they are PyTorch's own; without them, every call goes by way of the dispatcher
        for inference in (False, True):
            with torch.inference_mode(inference):
                _PLAIN_KEYS.add(_keys_of(torch.empty(0, device="cpu")))
                _THREAD_KEYS.add(_keys_of_thread())


# In a thread of its own, where no mode is on that may be on where this module is imported.
_looking = threading.Thread(target=_look)
_looking.start()
_looking.join()


def _wants_gradient(*values: object) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _refuse(ctx: Any, *grads: Any) -> NoReturn:
    raise BinarizeError(
        "packed layers have no gradient; train the unpacked model, or call binarize.unpack(model), which gives +-1 "
        "latent weights and fixed scales."
    )
