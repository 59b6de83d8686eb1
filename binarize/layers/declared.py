"""Whether calling a module does what its class declares: fused code may then take the module's place."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import nn


def runs_as_declared(part: object, name: str, hooks: bool = False) -> bool:
    """Return whether an attribute or method of a module's class describes what calling the module does.

    It does not if a subclass of the class that declares it has another ``forward``, or if ``forward`` was replaced on
    the instance or the class. Unless ``hooks`` are allowed, the module must have none, and no subclass may have other
    methods, which ``forward`` could call.
    """
    if not isinstance(part, nn.Module) or not (runs_own_forward(part) and (hooks or not is_hooked(part))):
        return False
    kinds = type(part).__mro__
    if name in vars(part):  # set by a class's constructor, or by the user on this module
        declares = [name in getattr(vars(kind).get("__init__"), "__code__", _NO_CODE).co_names for kind in kinds]
        if True not in declares:
            return True
    else:
        declares = [name in vars(kind) for kind in kinds]
    subclasses = kinds[: declares.index(True) if True in declares else len(kinds)]
    if hooks:
        return not any("forward" in vars(kind) for kind in subclasses)
    return not any(_has_methods(kind) for kind in subclasses)


_NO_CODE = (lambda: None).__code__


def runs_own_forward(module: nn.Module) -> bool:
    """Return whether calling a module runs the ``forward`` of its class, which has not been replaced."""
    return "forward" not in vars(module) and calls_own_forward(type(module))


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks of its forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def calls_own_forward(kind: type[nn.Module]) -> bool:
    """Return whether calling a module runs the ``forward`` that its class was defined with.

    A function that was assigned to the class afterwards comes from another place, and a decorated one has other code.
    """
    forward = kind.forward
    check: Callable[..., bool] = _is_own if torch.compiler.is_compiling() else _is_own_cached  # Dynamo traces no caches
    return isinstance(forward, FunctionType) and check(kind, forward, kind.__call__)


def _is_own(kind: type[nn.Module], forward: FunctionType, call: Callable[..., Any]) -> bool:
    # A tracer may have replaced the call of all modules.
    if call is not nn.Module.__call__ or forward.__code__.co_name != "forward":
        return False
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    if forward.__module__ != owner.__module__:
        return False
    # torch.compile cannot read a function's qualified name.
    return torch.compiler.is_compiling() or forward.__qualname__ == f"{owner.__qualname__}.forward"


_is_own_cached: Callable[..., bool] = lru_cache(maxsize=256)(_is_own)


def _has_methods(kind: type) -> bool:
    methods = FunctionType, property, classmethod, staticmethod
    members = vars(kind).items()
    return any(isinstance(m, methods) and name != "extra_repr" and name[:2] != "__" for name, m in members)
