"""What `convert` takes for a layer: the plain layer of torch.nn that a module computes, or why it has none.

Besides torch.nn's own classes, these are classes registered with `register_layer`, and modules that compute exactly a
convolution or a linear layer with parameters of their own, such as EDM's ``Conv2d`` and ``Linear`` and score_sde's
``NIN``. The latter are found by their parameters and checked with random ones, so no library is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.layers.declared import is_hooked

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
ToPlain = Callable[[Any], nn.Module | str]
FromPlain = Callable[[Any, Any], None]
_CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_CALLS = ("forward", "_conv_forward", "__call__", "_call_impl")


@dataclass(frozen=True)
class Adapter:
    """The functions given to `register_layer`."""

    to_plain: ToPlain
    from_plain: FromPlain | None


@dataclass(frozen=True)
class Original:
    """A layer that a binary one replaced, without its parameters, for `binarize.revert`.

    ``names`` maps its parameters to those of the plain layer, unless ``from_plain`` writes them.
    """

    shell: nn.Module
    names: tuple[tuple[str, str], ...]
    from_plain: FromPlain | None = None

    def restored(self, plain: nn.Module) -> nn.Module:
        """Return a layer of the original class with the parameters of a plain one."""
        layer = _with_parameters(self.shell, lambda parameter: parameter)
        for name, attribute in self.names:
            setattr(layer, name, getattr(plain, attribute))
        if self.from_plain is not None:
            self.from_plain(layer, plain)
        return layer.train(plain.training)


@dataclass(frozen=True)
class Layer:
    """A layer of a model: its plain form, or, with the reason why it has no binary form, the layer itself."""

    plain: nn.Module
    original: Original | None = None
    obstacle: str | None = None
    adapted: bool = False  # whether its class is not one of torch.nn's
    legacy: bool = False  # whether version 0.1 converted it

    @property
    def weight(self) -> Tensor:
        """The weight, or the largest parameter of a class that has none."""
        weight = getattr(self.plain, "weight", None)
        return weight if isinstance(weight, Tensor) else max(self.plain.parameters(), key=Tensor.numel)


_ADAPTERS: dict[type[nn.Module], Adapter] = {}


def register_layer(
    cls: type[nn.Module], to_plain: ToPlain, *, from_plain: FromPlain | None = None, replace: bool = False
) -> None:
    """Tell `binarize.convert` what a class of layers computes, so that it can become binary.

    Without a registration, a subclass with its own ``forward`` and a class with its own weights stay full precision.
    The binary layer is called as ``layer(x)``. The registration has to be repeated before `binarize.load`.

    Args:
        cls: The class; it also stands for subclasses that inherit its ``forward``.
        to_plain: ``to_plain(layer)`` returns an nn.Conv1d, nn.Conv2d, nn.Conv3d or nn.Linear that holds all parameters
            of the layer, if possible as the same Parameter objects; or a string, the reason to keep this layer.
        from_plain: ``from_plain(layer, plain)`` writes the parameters of the plain layer into a layer of the class, for
            `binarize.revert`. It is needed if ``to_plain`` does not return the same Parameter objects.
        replace: Allow the class to be registered already.

    Raises:
        BinarizeError: If ``cls`` is no class of modules, or is registered already.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise BinarizeError(f"register_layer needs a class derived from nn.Module; got {cls!r}.")
    if cls in _ADAPTERS and not replace:
        raise BinarizeError(f"the layer class {cls.__name__} is already registered; pass replace=True to replace it.")
    _ADAPTERS[cls] = Adapter(to_plain, from_plain)


def find_layer(module: nn.Module) -> Layer | None:
    """Return a module's plain form or the reason why it has none, or None if it is not known as a layer."""
    changed = _changed(module)
    adapter = _registered(type(module))
    if adapter is not None:
        return Layer(module, obstacle=changed, adapted=True) if changed else _adapted(module, adapter)
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        obstacle = _obstacle(module)
        legacy = obstacle is None and isinstance(module, nn.Conv2d | nn.Linear)
        obstacle = obstacle or _overridden(module) or changed
        original = None if type(module) in PLAIN or obstacle else _original(module, module, None)
        return Layer(module, original, obstacle, legacy=legacy)
    builtin = _by_structure(module)
    if builtin is None:
        return None
    plain = builtin.to_plain(module)
    if isinstance(plain, str):
        return Layer(module, obstacle=plain, adapted=True)
    if changed:
        return Layer(module, obstacle=changed, adapted=True)
    return _adapted(module, builtin) if _computes(module, builtin.to_plain) else None


def _registered(cls: type[nn.Module]) -> Adapter | None:
    for base in cls.__mro__:
        if base in _ADAPTERS and cls.forward is base.forward and cls.__call__ is base.__call__:
            return _ADAPTERS[base]
    return None


def _adapted(module: nn.Module, adapter: Adapter) -> Layer:
    name, plain = type(module).__name__, adapter.to_plain(module)
    if isinstance(plain, str):
        return Layer(module, obstacle=plain, adapted=True)
    if type(plain) not in PLAIN:
        kinds = ", ".join(f"nn.{kind.__name__}" for kind in PLAIN)
        raise BinarizeError(f"to_plain of {name} must return one of {kinds}, or a reason; got {type(plain).__name__}.")
    held, taken = (sum(p.numel() for p in m.parameters()) for m in (module, plain))
    if held != taken:
        raise BinarizeError(
            f"to_plain of {name} must take over all {held} numbers in the layer's parameters; it took {taken}. Return "
            "a reason to keep layers that compute more than a convolution or a linear layer."
        )
    return Layer(plain.train(module.training), _original(module, plain, adapter.from_plain), adapted=True)


def _original(module: nn.Module, plain: nn.Module, from_plain: FromPlain | None) -> Original:
    own = [(name, parameter) for name, parameter in module._parameters.items() if parameter is not None]
    new = {id(parameter): name for name, parameter in plain.named_parameters()}
    names = tuple((name, new[id(parameter)]) for name, parameter in own if id(parameter) in new)
    if from_plain is None and len(names) < len(new):
        raise BinarizeError(
            f"to_plain of {type(module).__name__} made new parameters; return the layer's own Parameter objects, or "
            "pass from_plain=, which writes them back."
        )
    shell = _with_parameters(module, lambda p: nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad))
    return Original(shell, names, from_plain)


def _with_parameters(module: nn.Module, change: Callable[[nn.Parameter], nn.Parameter]) -> Any:
    """Return a shallow copy of a module with other parameters."""
    twin = copy.copy(module)
    twin._parameters = {n: None if p is None else change(p) for n, p in module._parameters.items()}
    twin._buffers, twin._modules = dict(module._buffers), dict(module._modules)
    return twin


# Why a layer has no binary form


def _obstacle(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this layer's weight without calling the layer"
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution: it inserts zeros between the pixels, and a zero has no sign"
    base = next((cls for cls in PLAIN if isinstance(layer, cls)), None)
    if base is None:
        return f"{type(layer).__name__}: not a 1-D, 2-D or 3-D convolution or linear layer"
    return None if type(layer).forward is base.forward else _overrides(layer, "forward")


def _overridden(layer: nn.Module) -> str | None:
    """Return what a layer's class changes about torch.nn's, or torch.nn's class itself was given."""
    for name in _CALLS:
        function = getattr(type(layer), name, None)
        if function is not None and not str(getattr(function, "__module__", "")).startswith("torch.nn.modules."):
            return _overrides(layer, name)
    return None


def _overrides(layer: nn.Module, name: str) -> str:
    kind = "linear layer" if isinstance(layer, nn.Linear) else "convolution"
    return f"{type(layer).__name__} has a {name} of its own, which a binary {kind} would drop"


def _changed(layer: nn.Module) -> str | None:
    """Return what was added to this layer, or changed about it, after it was made."""
    if hasattr(layer, "_hf_hook"):
        return "accelerate moves its weights; convert first, or call accelerate.hooks.remove_hook_from_submodules"
    replaced = next((name for name in _CALLS if name in vars(layer)), None)
    if replaced is not None:
        return f"its {replaced} was replaced on the instance, which a binary layer would drop"
    if is_hooked(layer):
        return "it has hooks, which a binary layer would drop; register them after the conversion"
    if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear) and layer._parameters.get("weight") is None:
        return "its weight is a buffer or a plain tensor, not an nn.Parameter"
    return None


# Layers by their structure


def _by_structure(module: nn.Module) -> Adapter | None:
    """Return how a module with parameters of a layer may be one, or None."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    if type(module).__module__.startswith("torch.") or any(True for _ in module.children()):
        return None
    if own.keys() == {"W", "b"} and own["W"].dim() == 2 and own["b"].shape == own["W"].shape[1:]:
        return Adapter(_pointwise, _write_pointwise)
    weight = own.get("weight")
    if own.keys() - {"weight", "bias"} or weight is None or not 2 <= weight.dim() <= 5:
        return None
    return Adapter(_weighted, None) if "bias" not in own or own["bias"].shape == weight.shape[:1] else None


def _pointwise(layer: Any) -> nn.Module:
    """Return score_sde's NIN as a 1x1 convolution; its weight ``W`` is ``(C_in, C_out)``."""
    weight, bias = layer.W.detach().t()[:, :, None, None].contiguous(), layer.b
    plain = nn.Conv2d(layer.W.shape[0], layer.W.shape[1], 1, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=layer.W.requires_grad), bias
    return plain


def _write_pointwise(layer: Any, plain: Any) -> None:
    weight = plain.weight.detach()[:, :, 0, 0].t().contiguous()
    layer.W, layer.b = nn.Parameter(weight, requires_grad=plain.weight.requires_grad), plain.bias


def _weighted(layer: Any) -> nn.Module | str:
    """Return a layer with a torch-like ``weight`` and ``bias`` as torch.nn's, with the padding of EDM's by default."""
    if getattr(layer, "up", False) is True or getattr(layer, "down", False) is True:
        return f"{type(layer).__name__} resamples with a filter in its forward, which a binary convolution would drop"
    weight, bias = layer.weight, layer._parameters.get("bias")
    out, width, *kernel = weight.shape
    plain: nn.Module
    if not kernel:
        plain = nn.Linear(width, out, bias=bias is not None, device="meta")
    else:
        steps: dict[str, Any] = {name: getattr(layer, name, 1) for name in ("stride", "dilation", "groups")}
        padding = getattr(layer, "padding", tuple(size // 2 for size in kernel))
        wide = width * steps["groups"]
        plain = _CONVOLUTIONS[weight.dim()](
            wide, out, tuple(kernel), padding=padding, bias=bias is not None, device="meta", **steps
        )
    plain.weight, plain.bias = weight, bias
    return plain


def _computes(module: nn.Module, to_plain: ToPlain) -> bool:
    """Return whether a module computes its plain form, in both modes, by a copy with small random parameters."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(like: Tensor) -> nn.Parameter:  # of mean 1/4, so that normalized weights give something else
        return nn.Parameter(torch.rand(like.shape, generator=generator, device="cpu") * 1.5 - 0.5)

    with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            twin = _with_parameters(module, random)
            plain: Any = to_plain(twin)
            width = plain.in_features if isinstance(plain, nn.Linear) else plain.in_channels
            sizes = () if isinstance(plain, nn.Linear) else [2 * k + i for i, k in enumerate(plain.kernel_size)]
            x = torch.rand(2, width, *sizes, generator=generator) - 0.5
            expected = plain(x)
            for mode in (True, False):
                found = twin.train(mode)(x.clone())
                if found.shape != expected.shape or (found - expected).abs().max() > 1e-3 * expected.abs().max():
                    return False
        except Exception:  # anything may be called; a module that cannot be called like this is not a layer
            return False
    return True
