"""Packed operators: registered with PyTorch's dispatcher, cheap to call, and without a gradient.

`torch.library.custom_op` asks about gradients and aliases in Python each time, which takes as long as the kernels of a
small layer. These operators leave both out: nothing is returned that was given, and who asks for a gradient is answered
once, where the call is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from binarize.errors import BinarizeError

_library = torch.library.Library("binarize", "FRAGMENT")
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Operator(Generic[_P, _R]):
    """A function that is an operator of PyTorch's: `torch.export` and `torch.compile` see a call and not its inside.

    Args:
        function: What it does, on any device; it returns new tensors.
        schema: Its arguments and results; taken from annotations if None.

    Attributes:
        overload: What the dispatcher knows it as, for `torch.library.opcheck`.
    """

    def __init__(self, function: Callable[_P, _R], schema: str | None = None) -> None:
        self.__doc__, self.name = function.__doc__, function.__name__
        found = schema or torch.library.infer_schema(function, mutates_args=())
        _library.define(self.name + found, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(self.name, function, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.binarize, self.name).default

    def register_fake(self, function: Callable[_P, Any]) -> Callable[_P, Any]:
        """Say what comes out, from shapes and dtypes alone."""
        torch.library.register_fake(f"binarize::{self.name}", function, lib=_library)
        return function

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run the operator; its result refuses to give a gradient, if any argument asks for one."""
        asked = torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in args)
        if asked and not torch.compiler.is_compiling():
            out: _R = _Refused.apply(self.overload, *args)
            return out
        out = self.overload(*args, **kwargs)
        return out


def operator(schema: str | None = None) -> Callable[[Callable[_P, _R]], Operator[_P, _R]]:
    """Return a decorator that makes an `Operator` of a function."""
    return lambda function: Operator(function, schema)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, overload: Any, *args: Any) -> Any:
        return overload(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise BinarizeError(
            "packed layers have no gradient; train the unpacked model, or call binarize.unpack(model), which gives +-1 "
            "latent weights and fixed scales."
        )
