"""Completes the exported model: local functions, fewer bits for weights where that is exact, nothing for debugging."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from binarize.onnx.functions import DOMAIN, GROUP_NORM, ROWS, SIGNS, Kind, Step, binary_layer
from binarize.packed.int8 import round_to_int8

_LEAST_SHRUNK = 32  # values; a Cast takes as many bytes as it would save in smaller tensors
_KINDS: tuple[Kind, ...] = ("BinaryConv", "BinaryLinear")


def finish(model: Any, metadata: Mapping[str, str]) -> None:
    """Complete an ``onnx.ModelProto`` in place."""
    _strip(model)
    _pad_channels(model.graph)
    _shrink(model.graph)
    _add_functions(model)
    _name_axes(model.graph)
    del model.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)


def _nodes(graph: Any) -> Iterator[Any]:
    """Iterate over the nodes of a graph and of those inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _nodes(inner)


def _strip(model: Any) -> None:
    """Remove what runtimes do not read: debugging information, shapes inside the graph and unused weights."""
    graph = model.graph
    used = {name for node in _nodes(graph) for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:], graph.value_info[:], graph.metadata_props[:]
    graph.initializer.extend(kept)
    for node in _nodes(graph):
        node.ClearField("name")
        node.ClearField("doc_string")
        del node.metadata_props[:]
    for value in [*graph.initializer, *graph.input, *graph.output]:
        value.ClearField("doc_string")
        del value.metadata_props[:]


def _pad_channels(graph: Any) -> None:
    """Add channels of zeros to the convolutions that onnxruntime-web computes wrongly with WebGPU.

    Version 1.30 gives wrong sums over 6, 9, 15, 18... channels: multiples of 3 above 3 that are no multiples of 4, with
    kernels larger than 1x1. See https://github.com/microsoft/onnxruntime/issues/29651.
    """
    from onnx import helper, numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes, padded = [], {}
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is not None and _is_wrong_in_webgpu(node, *weight.dims[1:]):
            edges = np.zeros((2, len(weight.dims)), np.int64)
            edges[1, 1] = -weight.dims[1] % 4
            padded[weight.name] = edges
            source, pads = f"{node.output[0]}.source", f"{weight.name}.pads"
            nodes.append(helper.make_node("Pad", [node.input[0], pads], [source]))
            node.input[0] = source
        nodes.append(node)
    for name, edges in padded.items():
        values = np.pad(numpy_helper.to_array(weights[name]), edges.T)
        weights[name].CopyFrom(numpy_helper.from_array(values, name))
        graph.initializer.append(numpy_helper.from_array(edges.ravel(), f"{name}.pads"))
    del graph.node[:]
    graph.node.extend(nodes)


def _is_wrong_in_webgpu(convolution: Any, channels: int, *kernel: int) -> bool:
    grouped = any(attribute.name == "group" and attribute.i > 1 for attribute in convolution.attribute)
    return not grouped and channels > 3 and channels % 3 == 0 and channels % 4 > 0 and max(kernel) > 1


def _shrink(graph: Any) -> None:
    """Store weights as float16, or in 8 bits with a step for each channel, where that is exact.

    The binary layers convert float16 themselves; other nodes get a Cast, and a Mul by the steps.
    """
    from onnx import TensorProto, helper, numpy_helper

    readers: dict[str, list[str]] = {}
    for node in _nodes(graph):
        for name in node.input:
            readers.setdefault(name, []).append(node.domain)
    added, steps = [], []
    for tensor in graph.initializer:
        name, values = tensor.name, np.empty(0)
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
        if values.size < _LEAST_SHRUNK:
            continue
        convert = any(domain != DOMAIN for domain in readers[name])
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.array_equal(half.astype(np.float32), values):
            stored = f"{name}.half" if convert else name
            tensor.CopyFrom(numpy_helper.from_array(half, stored))
            if convert:
                added.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
        elif convert and (found := _integers(values)) is not None:
            integers, step = found
            stored, cast, factor = f"{name}.int8", f"{name}.cast", f"{name}.step"
            tensor.CopyFrom(numpy_helper.from_array(integers, stored))
            steps.append(numpy_helper.from_array(step, factor))
            added.append(helper.make_node("Cast", [stored], [cast], to=TensorProto.FLOAT))
            added.append(helper.make_node("Mul", [cast, factor], [name]))
    graph.initializer.extend(steps)
    nodes = [*added, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _integers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return int8 integers and float32 steps whose product the values are; None if there are none."""
    for channel in range(values.ndim) if values.ndim > 1 else ():  # the exporter transposes some weights
        weight = torch.from_numpy(np.moveaxis(values, channel, 0).copy())
        found, step = round_to_int8(weight)
        integers = np.ascontiguousarray(np.moveaxis(found.numpy(), 0, channel))
        steps = step.view(torch.float32).numpy().reshape([-1 if axis == channel else 1 for axis in range(values.ndim)])
        if np.array_equal(integers * steps, values):
            return integers, steps
    return None


def _add_functions(model: Any) -> None:
    """Add the local functions that the nodes call."""
    from onnx import parser

    called = sorted({node.op_type for node in _nodes(model.graph) if node.domain == DOMAIN})
    texts = [GROUP_NORM] if "GroupNorm" in called else []
    for name in called:
        kind, *steps = name.split("_")
        if kind in _KINDS:
            texts.append(binary_layer(kind, _steps(steps)))
    if any(name.startswith((*_KINDS, "Signs")) for name in called):
        texts.append(SIGNS)
    for text in texts:
        model.functions.append(parser.parse_function(text))
    if texts and all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.add(domain=DOMAIN, version=1)


def _steps(names: Sequence[str]) -> list[Step]:
    known: Any = [*ROWS, "Unsigned", "EarlyShortcut", "Clamp", "Shortcut"]
    return [known[known.index(name)] for name in names]


def _name_axes(graph: Any) -> None:
    """Name the dynamic axes: batch, and those of images, which an output shares with an input where they are equal."""
    names: dict[str, str] = {}
    for value in [*graph.input, *graph.output]:
        axes = value.type.tensor_type.shape.dim
        kinds = ["batch", "channels", "height", "width"] if len(axes) == 4 else ["batch"]
        for number, axis in enumerate(axes):
            if axis.HasField("dim_param"):
                kind = kinds[number] if number < len(kinds) else f"{value.name}_{number}"
                taken = kind in names.values()
                axis.dim_param = names.setdefault(axis.dim_param, f"{value.name}_{kind}" if taken else kind)


def describe(path: Path) -> str:
    """Return a line with the names and shapes of a file's inputs and outputs."""
    from onnx import load

    graph = load(path).graph
    return f"{_shapes(graph.input)} to {_shapes(graph.output)}"


def _shapes(values: Collection[Any]) -> str:
    shapes = ([axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in values)
    return ", ".join(
        f"{value.name} ({', '.join(map(str, shape))})" for value, shape in zip(values, shapes, strict=True)
    )
