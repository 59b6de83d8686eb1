"""`binarize.export_onnx`: a packed model as an ONNX file whose binary weights are single bits."""

from __future__ import annotations

import copy
import inspect
import json
import re
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from binarize.conversion.packing import is_packed, pack
from binarize.conversion.record import QUANTIZATION, conversion
from binarize.conversion.summary import default_inputs
from binarize.errors import BinarizeError, one_line
from binarize.files import check_new_file, followed, write_atomic
from binarize.models import SRUNet
from binarize.models.checks import is_whole
from binarize.modules import call_arguments, unwrap
from binarize.onnx.functions import OPSET
from binarize.onnx.layers import prepare
from binarize.onnx.pipelines import Pipeline, sampling_of, whole_of
from binarize.onnx.protos import finish

MAX_STEPS = 50
"""The largest number of denoising steps in a file."""


def export_onnx(
    model: nn.Module | Pipeline,
    path: str | PathLike[str],
    *,
    steps: int | None = None,
    example_inputs: Any = None,
    force: bool = False,
) -> Path:
    """Write a binary model as an ONNX file that any runtime can run, and return its path.

    Binary weights stay single bits in the file, and other weights are float16 where that changes none of them. Each
    binary layer is a function of the domain ``binarize`` whose body consists of standard operators of opset 18. The
    arithmetic is float32. The batch, and height and width of images, are dynamic. The file's metadata hold the
    configuration (``binarize.config``) and, of a pipeline, all that sampling needs (``binarize.sampling``).

    Args:
        model: A packed or binary model, which stays as it is, or a `SuperResolutionPipeline` or `GenerationPipeline`
            with one. Without ``steps`` the file holds the network, whose inputs are those of its forward, timesteps as
            float32 (B,) and class labels as int64 (B,).
        path: The file.
        steps: The number of denoising steps, for a pipeline with `DDIMScheduler`: the file then does all that the
            pipeline does. The graph has a copy of the network for each step, at most 50.

            A `SuperResolutionPipeline` enlarges images, from ``image`` (B, 3, h, w) in [0, 1] and Gaussian ``noise``
            (B, 3, H, W) to (B, 3, scale * h, scale * w). H and W are the result's, rounded up to multiples of the
            network's `size_multiple`. A `GenerationPipeline` draws images in [0, 1], from Gaussian ``noise``
            (B, C, H, W) and, with classes, ``class_labels`` (B,) in int64.
        example_inputs: Inputs of the network's forward: a tensor, a tuple of arguments or a dict of keyword arguments,
            with a batch of at least 2. `SRUNet` and diffusers' U-Nets need none.
        force: Replace an existing file.

    Raises:
        BinarizeError: If onnx or onnxscript is missing, the model is not binary, PyTorch cannot export it, or its
            scheduler or its autoencoder cannot be written into a file.
    """
    _check_packages()
    path = followed(Path(path))
    check_new_file(path, force=force)
    if steps is not None and example_inputs is not None:
        raise BinarizeError("export: example_inputs has no effect with steps; leave it out.")
    if steps is not None and not (is_whole(steps) and steps <= MAX_STEPS):
        raise BinarizeError(
            f"export: steps={steps!r}: must be from 1 to {MAX_STEPS}, since the file repeats the network for each "
            "step; export the network alone, whose metadata have the numbers of the steps."
        )
    pipeline = model if isinstance(model, Pipeline) else None
    if steps is not None and pipeline is None:
        kinds = "a SuperResolutionPipeline or a GenerationPipeline"
        raise BinarizeError(f"export: steps={steps} needs {kinds}; got a {type(model).__name__}.")
    network = unwrap(cast(nn.Module, model if pipeline is None else pipeline.unet))
    metadata = {"binarize.config": json.dumps(_config(network))}
    if pipeline is not None:
        metadata["binarize.sampling"] = json.dumps(sampling_of(pipeline, steps))
    prepared = _prepared(network)
    if steps is None or pipeline is None:
        args, kwargs = _inputs(network, example_inputs)
        inputs: dict[str, Any] = {"args": args, "kwargs": kwargs}
        multiple = network.size_multiple if isinstance(network, SRUNet) else None
        names = [name for name, _ in _named(network, args, kwargs)]
        proto = _translate(_Network(prepared), inputs, _axes(inputs, multiple), names, ["output"])
    else:
        whole = whole_of(pipeline, prepared, steps)
        axes = {name: _axes(value, whole.multiples.get(name)) for name, value in whole.inputs.items()}
        proto = _translate(whole.module, whole.inputs, axes, list(whole.inputs), [whole.output])
    finish(proto, metadata)
    return write_atomic(path, lambda file: file.write_bytes(proto.SerializeToString()), force=force)


def _check_packages() -> None:
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise BinarizeError(f"export: needs {package}: pip install 'binarize-diffusion[onnx]'.")
    if not hasattr(torch.onnx, "ops"):
        raise BinarizeError(f"export: needs PyTorch 2.8 or newer; this is {torch.__version__}.")


def _config(network: nn.Module) -> dict[str, Any]:
    config: Any = getattr(network, "config", {})
    own = {
        key: value for key, value in dict(config).items() if key[0] != "_" and key not in ("conversion", QUANTIZATION)
    }
    return {"class": type(network).__name__, **own, "conversion": conversion(network).to_config()}


def _prepared(network: nn.Module) -> nn.Module:
    """Return a copy of a network whose layers are nodes of the file."""
    own = copy.deepcopy(network).float().cpu().eval()
    return prepare(own if is_packed(own) else pack(own)).requires_grad_(False)


class _Network(nn.Module):
    """A network whose outputs are tensors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the network."""
        out = self.network(*args, **kwargs)
        return out.to_tuple() if isinstance(out, BaseOutput) else out


def _inputs(network: nn.Module, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example arguments of a network's forward, with a batch of 2 if none are given."""
    args, kwargs = call_arguments(default_inputs(network) if given is None else given, "export")
    if given is None:  # images are wider than high, so that the two are told apart

        def example(like: Tensor) -> Tensor:
            return torch.zeros(2, *like.shape[1:-1], *[like.shape[-1] * (1 + (like.dim() > 3))][: like.dim() - 1])

        args, kwargs = tree_map(example, (args, kwargs))
        kwargs = {name: value.long() if name == "class_labels" else value for name, value in kwargs.items()}
    for name, value in _named(network, args, kwargs):
        if value.dim() == 0 or len(value) < 2:
            shape = tuple(value.shape)
            raise BinarizeError(f"export: {name} in example_inputs needs a batch of at least 2; got the shape {shape}.")
    return args, kwargs


def _named(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Return the tensors among the arguments of a network's forward, with the names that they have in the file."""
    parameters = inspect.signature(network.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    named: dict[str, Any] = {(positional[i : i + 1] or [f"input_{i}"])[0]: value for i, value in enumerate(args)}
    leaves = tree_flatten_with_path({**named, **kwargs})[0]
    tensors = [(keystr(path), value) for path, value in leaves if isinstance(value, Tensor)]
    return [(".".join(re.findall(r"\w+", path)), value) for path, value in tensors]


def _axes(inputs: Any, multiple: int | None) -> Any:
    """Return the axes of example inputs that may have other sizes: all but those of channels.

    Images of a network with a ``multiple`` share two axes, height and width, that are multiples of it.
    """
    auto = torch.export.Dim.AUTO
    sides = None if multiple is None else [multiple * torch.export.Dim(name) for name in ("rows", "columns")]

    def axes(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        if value.dim() == 4 and sides is not None:
            return {0: auto, 2: sides[0], 3: sides[1]}
        free = [0, *(range(2, value.dim()) if value.dim() > 3 else range(1, value.dim() - 1))]
        return dict.fromkeys(free, auto)

    return tree_map(axes, inputs)


def _translate(
    module: nn.Module, inputs: dict[str, Any], axes: Any, names: Sequence[str], outputs: Sequence[str]
) -> Any:
    """Return PyTorch's translation of a module, an ``onnx.ModelProto``."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program: Any = torch.onnx.export(
                module, kwargs=inputs, dynamo=True, verbose=False, opset_version=OPSET, input_names=list(names),
                output_names=list(outputs), dynamic_shapes=axes, external_data=False,
            )  # fmt: skip
        except (torch.onnx.OnnxExporterError, torch.onnx.errors.OnnxExporterError) as error:
            cause = error.__cause__ or error
            raise BinarizeError(f"export: PyTorch cannot export this network: {one_line(cause)}") from error
        return program.model_proto
