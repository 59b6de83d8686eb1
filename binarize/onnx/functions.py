"""The local functions of an exported model: ONNX's text of binary layers in standard operators.

A function is named after what it computes, such as ``BinaryConv_TimestepShift_Scale_RPReLU_Shortcut``, so that a
runtime can replace it by a kernel of its own. The formula is that of `binarize.kernels.binary_conv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

DOMAIN, OPSET = "binarize", 18
Kind = Literal["BinaryConv", "BinaryLinear"]
Step = Literal[
    "Unsigned", "TimestepShift", "Shift", "Scale", "Factor", "Offset", "EarlyShortcut", "TimestepRPReLU", "RPReLU",
    "Clamp", "Shortcut",
]  # fmt: skip
ROWS: dict[Step, tuple[str, ...]] = {
    "TimestepShift": ("threshold",),
    "Shift": ("threshold",),
    "Scale": ("scale",),
    "Factor": ("factor",),
    "Offset": ("offset",),
    "TimestepRPReLU": ("shift_in", "slope", "shift_out"),
    "RPReLU": ("shift_in", "slope", "shift_out"),
}
"""The inputs of each step, a row of channels for each timestep group: (1 or K, C)."""

_HEAD = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>'
_AXES = {"BinaryConv": "@row_axes", "BinaryLinear": "[1]"}
_ARITHMETIC: dict[Step, str] = {
    "Scale": "Mul({y}, scale_row)",
    "Factor": "Mul({y}, factor_row)",
    "Offset": "Add({y}, offset_row)",
    "EarlyShortcut": "Add({y}, x)",
    "Shortcut": "Add({y}, x)",
    "Clamp": "Clip({y}, lowest, highest)",
}


def function_name(kind: Kind, steps: Sequence[Step]) -> str:
    """Return the name of the function that computes a layer of these steps."""
    return "_".join([kind, *steps])


def function_inputs(steps: Sequence[Step]) -> list[str]:
    """Return the names of a function's inputs."""
    timed = ["timestep_group"] if any(step.startswith("Timestep") for step in steps) else []
    return ["x", "bits", *timed, *(name for step in steps for name in ROWS.get(step, ()))]


def binary_layer(kind: Kind, steps: Sequence[Step]) -> str:
    """Return the text of the function of a binary layer.

    Inputs: ``x`` float (B, C_in, ...), or (B, N, C_in) of a linear layer; ``bits`` uint8, the signs of the weights in
    their own order, most significant bit first; ``timestep_group`` int64 (1 or B); the rows of the steps, in float or
    float16. A bit of the input is 1 where ``x >= threshold``, and padding contributes 0.
    """
    body = [
        "weight = binarize.Signs <shape: ints = @weight_shape> (bits)",
        f"axes = Constant <value_ints: ints = {_AXES[kind]}> ()",
        "one = Constant <value_float = 1.0> ()",
        "minus_one = Constant <value_float = -1.0> ()",
    ]
    if "Clamp" in steps:
        body += [
            "lowest = Constant <value_float: float = @low> ()",
            "highest = Constant <value_float: float = @high> ()",
        ]
    for step in steps:
        for name in ROWS.get(step, ()):
            row, body = f"{name}_float", [*body, f"{name}_float = Cast <to = 1> ({name})"]
            if step.startswith("Timestep"):
                row, body = f"{name}_chosen", [*body, f"{name}_chosen = Gather <axis = 0> ({row}, timestep_group)"]
            body.append(f"{name}_row = Unsqueeze ({row}, axes)")
    body.append("above = GreaterOrEqual (x, threshold_row)")
    body.append("signs = " + ("Cast <to = 1> (above)" if "Unsigned" in steps else "Where (above, one, minus_one)"))
    if kind == "BinaryConv":
        options = "strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations, group: int = @group"
        body.append(f"dot = Conv <{options}> (signs, weight)")
        attributes = "<weight_shape, strides, pads, dilations, group, row_axes"
    else:
        body += ["columns = Transpose <perm = [1, 0]> (weight)", "dot = MatMul (signs, columns)"]
        attributes = "<weight_shape"
    y = "dot"
    for step in steps:
        if step in ("RPReLU", "TimestepRPReLU"):
            body += [f"shifted = Add ({y}, shift_in_row)", "bent = PRelu (shifted, slope_row)"]
            body.append(f"{step}_y = Add (bent, shift_out_row)")
        elif step in _ARITHMETIC:
            body.append(f"{step}_y = {_ARITHMETIC[step].format(y=y)}")
        else:
            continue
        y = f"{step}_y"
    body.append(f"y = Identity ({y})")
    attributes += ", low, high>" if "Clamp" in steps else ">"
    signature = f"{function_name(kind, steps)} {attributes} ({', '.join(function_inputs(steps))}) => (y)"
    return "\n".join([_HEAD, signature, "{", *body, "}"])


SIGNS = f"""{_HEAD}
Signs <shape> (bits) => (weight)
{{
last = Constant <value_ints = [-1]> ()
first = Constant <value_ints = [0]> ()
places = Constant <value = uint8[8] {{7, 6, 5, 4, 3, 2, 1, 0}}> ()
lowest = Constant <value = uint8[1] {{1}}> ()
two = Constant <value_float = 2.0> ()
one = Constant <value_float = 1.0> ()
size = Constant <value_ints: ints = @shape> ()
column = Unsqueeze (bits, last)
shifted = BitShift <direction = "RIGHT"> (column, places)
bit = BitwiseAnd (shifted, lowest)
run = Reshape (bit, last)
count = ReduceProd <keepdims = 1> (size)
used = Slice (run, first, count)
number = Cast <to = 1> (used)
doubled = Mul (number, two)
signs = Sub (doubled, one)
weight = Reshape (signs, size)
}}"""
"""float of the given shape, +1 where a bit is 1 and else -1, of ``bits`` uint8 (ceil(weights / 8),)."""

GROUP_NORM = f"""{_HEAD}
GroupNorm <groups, channels, epsilon, weight_groups> (x, weight, bias) => (y)
{{
last = Constant <value_ints = [-1]> ()
split = Constant <value_ints: ints = @groups> ()
split_weight = Constant <value_ints: ints = @weight_groups> ()
joined = Constant <value_ints: ints = @channels> ()
least = Constant <value_float: float = @epsilon> ()
shape = Shape <start = -1> (x)
width = Cast <to = 1> (shape)
row_mean = ReduceMean <keepdims = 0> (x, last)
row_squares = ReduceSumSquare <keepdims = 0> (x, last)
row_square = Div (row_squares, width)
row_mean_square = Mul (row_mean, row_mean)
within = Sub (row_square, row_mean_square)
means = Reshape (row_mean, split)
withins = Reshape (within, split)
mean = ReduceMean <keepdims = 1> (means, last)
apart = Sub (means, mean)
apart_square = Mul (apart, apart)
spread = Add (withins, apart_square)
variance = ReduceMean <keepdims = 1> (spread, last)
positive = Relu (variance)
stable = Add (positive, least)
deviation = Sqrt (stable)
weight_float = Cast <to = 1> (weight)
bias_float = Cast <to = 1> (bias)
weights = Reshape (weight_float, split_weight)
biases = Reshape (bias_float, split_weight)
factors = Div (weights, deviation)
moved = Mul (mean, factors)
offsets = Sub (biases, moved)
factor = Reshape (factors, joined)
offset = Reshape (offsets, joined)
scaled = Mul (x, factor)
y = Add (scaled, offset)
}}"""
"""GroupNorm of x (B, C, ..., W) by the mean and the variance of each row, which are sums of few numbers."""
