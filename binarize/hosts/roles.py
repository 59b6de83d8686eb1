"""The roles of a network's layers: which read its input, which give its output, which see only its conditioning.

One forward on the meta device records an autograd graph and computes nothing; the graph tells what each layer reads.
If an argument is unknown, the layer that reads it gets an input of a shape that fits. If no such forward is possible,
the numbers of channels decide, and otherwise the order of registration.
"""

import copy
import inspect
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from binarize.errors import BinarizeError
from binarize.modules import call_arguments, meta_copy, prefixes
from binarize.timestep_argument import timestep_argument

Convolution = nn.modules.conv._ConvNd
_Layers = dict[Any, tuple[str, nn.Module, int]]  # by the node of each output: name, layer, dimensions; as called
Call = tuple[tuple[Any, ...], dict[str, Any]]

_LABELS = ("class_labels", "class_label", "labels", "classes", "y")
_SIZES = ("image_size", "img_size", "img_resolution", "sample_size", "resolution")
_MOST_CALLS = 20_000  # calls of layers: a forward that is a whole sampler is not followed to its end
_MOST_TRIES = 64  # shapes of the inputs that layers lack
_TOKENS = 16


@dataclass(frozen=True)
class Roles:
    """The names of layers by their role, and ``by`` what it was found: "forward", "channels" or "order".

    Attributes:
        inputs: Layers that read the model's input, and of other layers only what does not depend on it.
        outputs: Layers whose output becomes the model's output, and that no other layer reads.
        embeddings: Layers with an output of two dimensions that does not depend on the model's input: they process the
            timestep, a class or another condition. Only a forward finds them.
        idle: Convolutions that did not run in the forward.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    embeddings: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    by: str = "order"


def find_roles(
    model: nn.Module,
    example_inputs: Any = None,
    known: Sequence[str] = (),
    original: nn.Module | None = None,
    timestep: str | None = None,
) -> Roles:
    """Return the roles of the layers of a model, which is not changed.

    Args:
        model: The network.
        example_inputs: Inputs of its forward: a tensor, a tuple of arguments or a dict of keyword arguments. By default
            they are guessed from the signature of the forward.
        known: Names of modules whose role is known, as that of zero convolutions that give a network's output.
        original: The model that has values, if ``model`` is on the meta device. A copy of it runs if a forward on the
            meta device is not possible with ``example_inputs``.
        timestep: Name of the argument of the forward that is the timestep, if it is not one of those in use.

    Raises:
        BinarizeError: If the model cannot run on ``example_inputs``.
    """
    with torch.inference_mode(False), torch.enable_grad():  # the roles are read from the autograd graph
        if example_inputs is not None:
            return _by_example(model, call_arguments(example_inputs, "convert"), original)
        found = _by_guess(model, timestep)
    return found or _by_channels(model, known) or _by_widths(model) or _by_order(model)


def _by_example(model: nn.Module, call: Call, original: nn.Module | None) -> Roles:
    error: Exception | None = None
    for duplicate in (meta_copy, copy.deepcopy):  # some networks look at the values of their inputs
        try:
            return _Probe(duplicate(model if original is None else original)).roles(call)
        except Exception as failure:
            error = failure
    problem = f"{type(model).__name__} cannot run on example_inputs: {type(error).__name__}: {error}"
    raise BinarizeError(f"convert: {problem}. Pass example_inputs that its forward accepts.") from error


def _by_guess(model: nn.Module, timestep: str | None) -> Roles | None:
    """Return the roles that a forward with guessed inputs shows, or None if none of the guesses fits."""
    failures: dict[str, torch.Size] = {}
    try:
        probe = _Probe(meta_copy(model))
        for call in _guessed_calls(model, timestep):
            shape = call[0][0].shape
            try:
                return probe.filled_roles(call)
            except Exception as error:  # a foreign forward, called with guesses, can fail in every way
                if failures.setdefault(str(error), shape) != shape:  # the image makes no difference
                    return None
    except Exception:  # a module that cannot be copied, or whose forward has no signature
        return None
    return None


class _Missing(Exception):
    """A layer was called with None for its input, which may have any of ``shapes``."""

    def __init__(self, layer: str, shapes: list[tuple[int, ...]]) -> None:
        super().__init__(f"{layer} has no input")
        self.layer, self.shapes = layer, shapes


class _Probe:
    """Runs a copy of a network, which is changed, and finds the roles of its layers in the autograd graph."""

    def __init__(self, twin: nn.Module) -> None:
        self.twin = twin.eval().requires_grad_(True)
        self.layers: _Layers = {}
        self.images: set[Any] = set()
        self.ran: set[str] = set()
        self.filled: dict[str, tuple[int, ...]] | None = None  # shapes of the inputs that layers lack
        self.image: tuple[int, ...] = ()
        for name, module in twin.named_modules():
            module._forward_hooks.clear()  # the user's own
            module._forward_pre_hooks.clear()
            if getattr(module, "gradient_checkpointing", False) is True:
                vars(module)["gradient_checkpointing"] = False
            if _is_layer(module):
                module.register_forward_pre_hook(partial(self._fill, name))
                module.register_forward_hook(partial(self._note, name))

    def _fill(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give a layer that was called with None, since nothing told an argument of the forward, an input that fits."""
        if self.filled is None or not args or args[0] is not None:
            return None
        if name not in self.filled:
            raise _Missing(name, _accepted_shapes(module, self.image))
        value = torch.zeros(self.filled[name]).requires_grad_() * 1
        if value.dim() >= len(self.image):
            self.images.add(value.grad_fn)
        return (value, *args[1:])

    def _note(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        self.ran.add(name)
        if len(self.layers) >= _MOST_CALLS:
            raise RuntimeError(f"more than {_MOST_CALLS} calls of layers")
        if isinstance(out, Tensor) and out.grad_fn is not None:
            self.layers[out.grad_fn] = (name, module, out.dim())

    def filled_roles(self, call: Call) -> Roles:
        """Return the roles that a call with one image shows, in which None stands for arguments that nothing tells.

        A layer that is then called with None gets an input of the first shape with which the forward succeeds.
        """
        self.image = tuple(call[0][0].shape)
        untried: list[dict[str, tuple[int, ...]]] = [{}]
        error: Exception | None = None
        for _ in range(_MOST_TRIES):
            self.filled = untried.pop()
            try:
                return self.roles(call)
            except _Missing as missing:
                untried += [{**self.filled, missing.layer: shape} for shape in reversed(missing.shapes)]
                error = error or missing
            except Exception as failure:
                error = failure
            if not untried:
                break
        raise RuntimeError(str(error))

    def roles(self, call: Call) -> Roles:
        """Return the roles that a call of the network shows."""
        parameter = next(p for p in self.twin.parameters() if p.is_floating_point())
        rank = max(x.dim() for x in tree_leaves(call) if isinstance(x, Tensor) and x.is_floating_point())
        self.layers.clear()
        self.images.clear()
        self.ran.clear()

        def prepared(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.detach().to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            if not value.is_floating_point() or value.dim() < rank:
                return value
            image = value.requires_grad_() * 1  # not a leaf, which a forward could not change in place
            self.images.add(image.grad_fn)
            return image

        args, kwargs = tree_map(prepared, call)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), parameter.device:
            warnings.simplefilter("ignore")
            outputs = self.twin(*args, **kwargs)
        idle = [n for n, m in self.twin.named_modules() if isinstance(m, Convolution) and n not in self.ran]
        return replace(_roles(self.layers, self.images, _tensors(outputs)), idle=tuple(idle))


def _is_layer(module: nn.Module) -> bool:
    """Return True for a module that multiplies by a weight, of whatever class."""
    weighted = any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))
    return weighted and not isinstance(module, nn.Embedding) and not any(module.children())


def _accepted_shapes(layer: nn.Module, image: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shapes of a condition that a layer may read beside an image: tokens, a vector, or a smaller image."""
    if isinstance(layer, nn.Linear):
        return [(1, _TOKENS, layer.in_features), (1, layer.in_features)]
    if not isinstance(layer, Convolution) or len(image) != len(layer.kernel_size) + 2:
        return []
    scales = [(1, 1), *((1, 2**i) for i in range(1, 5)), *((2**i, 1) for i in range(1, 4))]
    return [(1, layer.in_channels, *(size * up // down for size in image[2:])) for up, down in scales]


def _tensors(outputs: Any) -> list[Tensor]:
    found = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    return found or [x for x in vars(outputs).values() if isinstance(x, Tensor)]  # a plain dataclass


def _roles(layers: _Layers, images: set[Any], outputs: Sequence[Tensor]) -> Roles:
    first: dict[str, nn.Module] = {}
    embeddings: dict[str, nn.Module] = {}
    follows: dict[Any, bool] = {}  # whether a layer's output depends on the model's input
    read = set()
    for node, (name, module, dims) in layers.items():
        sources, sees_input = _sources([edge for edge, _ in node.next_functions], layers, images)
        inner = any(follows.get(source, False) for source in sources)
        follows[node] = sees_input or inner
        read |= sources
        if sees_input and not inner:
            first[name] = module
        if not follows[node] and dims == 2:
            embeddings[name] = module
    ends, _ = _sources([x.grad_fn for x in outputs], layers, images)
    last = [name for node, (name, *_) in layers.items() if node in ends - read]
    if not first or not last:
        raise RuntimeError("the forward does not lead from the input to the output")
    convolutions = [name for name, module in first.items() if any(p.dim() >= 3 for p in module.parameters())]
    return Roles(tuple(convolutions or first), tuple(dict.fromkeys(last)), tuple(embeddings), by="forward")


def _sources(start: Sequence[Any], layers: Mapping[Any, Any], images: set[Any]) -> tuple[set[Any], bool]:
    """Return the layers that nodes of a graph read with no other layer between, and whether they read an image so."""
    found, seen, stack = set(), set(), list(start)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in layers:
            found.add(node)
        elif node not in images:
            stack += [edge for edge, _ in node.next_functions]
    return found, not images.isdisjoint(seen)


def _guessed_calls(model: nn.Module, timestep: str | None) -> Iterator[Call]:
    """Yield inputs that the forward of a model may accept: an image, a timestep, labels, and None for anything else."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    shapes = list(_guessed_shapes(model))
    if timestep is None and (usual := timestep_argument(model)) is not None:
        timestep = usual[0]
    labelled = {False, any(parameter.name in _LABELS for parameter in parameters)}
    dtypes = [torch.long] if timestep is None else [torch.long, torch.float32]
    for shape, dtype, with_label in itertools.product(shapes, dtypes, sorted(labelled)):
        kwargs: dict[str, Any] = {}
        for parameter in parameters[1:]:
            if parameter.name == timestep:
                kwargs[parameter.name] = torch.ones(1, dtype=dtype, device="meta")
            elif with_label and parameter.name in _LABELS:
                kwargs[parameter.name] = torch.zeros(1, dtype=torch.long, device="meta")
            elif (condition := _configured_condition(model, parameter.name)) is not None:
                kwargs[parameter.name] = torch.ones(condition, device="meta")
            elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                kwargs[parameter.name] = None
        yield (torch.zeros(shape, device="meta"),), kwargs


def _configured_condition(model: nn.Module, name: str) -> tuple[int, ...] | None:
    """Return the shape of a condition of diffusers' transformers that they use before a layer reads it."""
    if name in ("img_ids", "txt_ids"):
        axes = _value(model, "axes_dims_rope")
        return (_TOKENS, len(axes)) if isinstance(axes, Sequence) else None
    if name == "pooled_projections":
        width = _setting(model, "pooled_projection_dim")
        return None if width is None else (1, width)
    return (1,) if name == "guidance" and _value(model, "guidance_embeds") is True else None


def _guessed_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield shapes of one image, or of a sequence for a network without convolutions: configured widths come first."""
    convolutions = [(m, p) for m in model.modules() if _is_layer(m) for p in m.parameters(recurse=False) if p.dim() > 2]
    if not convolutions:
        widths = dict.fromkeys(module.in_features for module in model.modules() if isinstance(module, nn.Linear))
        told = [width for width in widths if width == _setting(model, "in_channels")]
        yield from ((1, _TOKENS, width) for width in dict.fromkeys([*told, *list(widths)[:5]]))
        return
    dims = Counter(weight.dim() - 2 for _, weight in convolutions).most_common(1)[0][0]
    configured = [_setting(model, key) for key in ("in_channels", "channels")]
    narrowest = sorted({getattr(module, "in_channels", weight.shape[1]) for module, weight in convolutions})[:5]
    sizes = [*(_setting(model, key) for key in _SIZES), 64, 224]
    for channels, size in itertools.product(dict.fromkeys([*configured, *narrowest]), dict.fromkeys(sizes)):
        if channels and size:
            yield (1, channels, *[size] * dims)


def _setting(model: nn.Module, key: str) -> int | None:
    """Return a number from a model's configuration, or else from its attributes."""
    value = _value(model, key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _value(model: nn.Module, key: str) -> Any:
    config = getattr(model, "config", None)
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return getattr(model, key, None) if value is None and not isinstance(config, Mapping) else value


def _by_channels(model: nn.Module, known: Sequence[str]) -> Roles | None:
    """Return the convolutions that read or give an image by their channels, or None if their channels do not tell.

    An image has the channels of the model's configuration, or else as many as the narrowest convolution has. They do
    not tell anything where a convolution keeps them, as those between features do.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Convolution) and not {*prefixes(n)} & {*known}}
    for squeeze in _squeezes(layers):
        del layers[squeeze]
    if not layers:
        return None
    found: list[list[str]] = []
    for key in ("in_channels", "out_channels"):
        widths = {name: getattr(layer, key) for name, layer in layers.items()}
        image = _setting(model, key)
        image = image if image in widths.values() else min(widths.values())
        ambiguous = any(layer.in_channels == layer.out_channels == image for layer in layers.values())
        if ambiguous and (key == "in_channels" or not known):
            return None
        found.append([] if ambiguous else [name for name, width in widths.items() if width == image])
    inputs, outputs = found
    last = _linear_ends(model)[1] or _by_order(model).outputs
    outputs += [name for name in last if isinstance(model.get_submodule(name), nn.Linear)]
    return Roles(tuple(inputs), tuple(outputs), by="channels")


def _by_widths(model: nn.Module) -> Roles | None:
    """Return the linear layers that read or give an image by their widths, if there is no convolution to do it."""
    inputs, outputs = _linear_ends(model)
    has_convolution = any(isinstance(module, Convolution) for module in model.modules())
    return None if has_convolution or not inputs or not outputs else Roles(inputs, outputs, by="channels")


def _linear_ends(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the linear layers outside blocks that read an image's configured channels, and that give its patches."""
    channels, patch = _setting(model, "in_channels"), _setting(model, "patch_size") or 1
    given = (_setting(model, "out_channels") or channels or 0) * patch**2
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not re.search(r"(^|\.)\d", n)}
    inputs = tuple(name for name, layer in layers.items() if layer.in_features == channels)
    return inputs, tuple(name for name, layer in layers.items() if layer.out_features == given)


def _squeezes(layers: Mapping[str, Any]) -> set[str]:
    """Return the pairs of pointwise convolutions that squeeze the features of a block and restore them."""
    found = set()
    pointwise = {n: m for n, m in layers.items() if "." in n and set(m.kernel_size) == {1}}
    for (one, a), (two, b) in itertools.permutations(pointwise.items(), 2):
        beside = one.rpartition(".")[0] == two.rpartition(".")[0]
        if beside and a.out_channels == b.in_channels < a.in_channels == b.out_channels:
            found |= {one, two}
    return found


def _by_order(model: nn.Module) -> Roles:
    convolutions = [name for name, m in model.named_modules() if isinstance(m, Convolution)]
    weighted = [name for name, m in model.named_modules() if isinstance(m, Convolution | nn.Linear)]
    return Roles(tuple((convolutions or weighted)[:1]), tuple(weighted[-1:]))
