"""Closed forms of binary layers, from the papers and released code, in numpy and without the toolkit.

`layer` evaluates a 3x3 convolution (stride 1, padding 1); torch differentiates the ordinary steps between binarizers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Array = np.ndarray
Vjp = Callable[[Array], Array]


@dataclass(frozen=True)
class Form:
    """What a method's layer computes, stage by stage; None leaves a stage out."""

    activation: str
    weight: str
    pre: str | None = None
    scale: str | None = None
    norm: bool = False
    post: str | None = None
    shortcut: str | None = None
    post_last: bool = False
    branch: bool = False
    options: tuple[tuple[str, float], ...] = ()

    def option(self, name: str, default: float) -> float:
        return dict(self.options).get(name, default)


def sign(x: Array, zero: str = "plus") -> Array:
    return np.sign(x) if zero == "zero" else np.where(x >= 0, 1.0, -1.0)


def ede(x: Array, t: float) -> Array:
    return max(1 / t, 1) * t * (1 - np.tanh(t * x) ** 2)


def ede_t(form: Form, progress: float) -> float:
    low, high = form.option("t_min", 0.1), form.option("t_max", 10.0)
    return 10 ** (math.log10(low) + (math.log10(high) - math.log10(low)) * progress)


def learned_step(form: Form, x: Array, step: float) -> tuple[Array, Vjp, Callable[[Array], Array]]:
    """LSQ's values, and the vector-Jacobian products of x and of the step (signed, 2^(bits - 1) levels below 0)."""
    low, high = -(2 ** (form.option("bits", 8) - 1)), 2 ** (form.option("bits", 8) - 1) - 1
    ratio = x / step
    inside, levels = (low < ratio) & (ratio < high), np.round(np.clip(ratio, low, high))
    slope = np.where(inside, levels - ratio, np.where(ratio <= low, low, high)) / math.sqrt(x[0].size * high)
    return levels * step, lambda g: g * inside, lambda g: (g * slope).sum()


def activation(form: Form, x: Array, progress: float = 0.0, zero: str = "plus") -> tuple[Array, Vjp]:
    """Return the activation's values and its vector-Jacobian product; one sample per first index."""
    hat = sign(x, zero)
    if form.activation == "none":
        return x, lambda g: g
    slopes: dict[str, Callable[[], Any]] = {
        "ste": lambda: np.abs(x) <= 1,
        "identity": lambda: 1,
        "approx": lambda: np.maximum(0, 2 - 2 * np.abs(x)),
        "ede": lambda: ede(x, ede_t(form, progress)),
    }
    if form.activation in slopes:
        return hat, lambda g: g * slopes[form.activation]()
    if form.activation == "round":
        n = 2 ** form.option("bits", 1) - 1
        return np.round(np.clip(x, 0, 1) * n) / n, lambda g: g * ((x >= 0) & (x <= 1))
    if form.activation == "mean":  # values of magnitude mean |x|, whose own gradient is clipped
        mean = np.abs(x).mean(axis=tuple(range(1, x.ndim)), keepdims=True)
        return mean * hat, lambda g: np.where(mean == 0, 0.0, g * (np.abs(x) <= 1))
    assert form.activation == "recu"
    axes, n = tuple(range(1, x.ndim)), x[0].size
    centred = x - x.mean(axis=axes, keepdims=True)
    size = np.sqrt((centred**2).sum(axis=axes, keepdims=True) / (n - 1) + 1e-5)

    def through_the_variance(g: Array) -> Array:
        g = g * np.maximum(0, 2 - 2 * np.abs(x / size))
        return g / size - (g * x).sum(axis=axes, keepdims=True) / size**3 * centred / (n - 1)

    return hat, through_the_variance


def standardise(w: Array, epsilon: float) -> tuple[Array, Vjp]:
    """(w - mean) / sqrt(var + epsilon) of each filter, and its vector-Jacobian product."""
    axes, n = tuple(range(1, w.ndim)), w[0].size
    centred = w - w.mean(axis=axes, keepdims=True)
    size = np.sqrt((centred**2).sum(axis=axes, keepdims=True) / (n - 1) + epsilon)

    def vjp(g: Array) -> Array:
        g = g / size - (g * centred).sum(axis=axes, keepdims=True) / size**3 * centred / (n - 1)
        return g - g.mean(axis=axes, keepdims=True)

    return centred / size, vjp


@dataclass(frozen=True)
class Weights:
    """Codes (n, *w.shape) and scales (n, out), and the gradients of w and of what else is learnt."""

    codes: Array
    scales: Array
    vjp: Callable[[Array], dict[str, Array]]


def weights(form: Form, parameters: dict[str, Array], progress: float = 0.0, zero: str = "plus") -> Weights:
    """Binarize ``parameters["weight"]``; gradients are of the scaled weights w_hat."""
    w = parameters["weight"]
    axes, n = tuple(range(1, w.ndim)), w[0].size
    one, clip, column = np.ones(len(w)), np.abs(w) <= 1, (-1, *[1] * (w.ndim - 1))

    def single(codes: Array, scales: Array, vjp: Vjp) -> Weights:
        return Weights(codes[None], scales[None], lambda g: {"weight": vjp(g)})

    filters, whole = np.abs(w).mean(axes), np.abs(w).mean() * one
    plain = {"sign": (one, clip), "sign_identity": (one, 1), "scaled": (filters, clip), "tensor": (whole, 1)}
    if form.weight in plain:
        scale, slope = plain[form.weight]
        return single(sign(w, zero), scale, lambda g: g * slope)
    if form.weight == "real":
        return single(w, one, lambda g: g)
    if form.weight in ("twn", "twn_filter", "absmean"):
        rows = w.reshape(len(w) if form.weight == "twn_filter" else 1, -1)
        mean = np.abs(rows).mean(1, keepdims=True)
        kept = np.abs(rows) > 0.7 * mean if form.weight != "absmean" else np.abs(np.round(rows / mean)) >= 1
        ternary = np.where(kept, np.sign(rows), 0.0).reshape(w.shape)
        scale = mean if form.weight == "absmean" else (np.abs(rows) * kept).sum(1) / np.maximum(kept.sum(1), 1)
        halves = np.stack([np.where(ternary >= 0, 1.0, -1.0), np.where(ternary > 0, 1.0, -1.0)])
        return Weights(halves, np.stack([scale.ravel() * one / 2] * 2), lambda g: {"weight": g})
    if form.weight == "xnor":
        centred = np.clip(w - w.mean(1, keepdims=True), -1, 1)
        alpha = np.abs(centred).mean(axes)
        factor = (alpha.reshape(column) * (np.abs(centred) < 1) + 1 / n) * (1 - 1 / w.shape[1])
        factor = factor * (n if form.option("sgd", 0) else 1)
        return single(sign(centred, zero), alpha, lambda g: g * factor)
    if form.weight == "libra":
        balanced, back = standardise(w, 0.0)
        scale = 2 ** np.round(np.log2(np.abs(balanced).mean(axes)))
        slope = scale.reshape(column) * ede(balanced, ede_t(form, progress))
        return single(sign(balanced, zero), scale, lambda g: back(g * slope))
    if form.weight == "recu":
        standard, back = standardise(w, 1e-5)
        standard = standard * 2 * math.sqrt(2)
        low, high = form.option("tau_min", 0.85), form.option("tau_max", 0.99)
        tau = low + (high - low) * (math.e**progress - 1) / (math.e - 1)
        bound = -np.abs(standard).mean() * math.log(2 - 2 * tau)
        return single(sign(standard, zero), one, lambda g: 2 * math.sqrt(2) * back(g * (np.abs(standard) <= bound)))
    assert form.weight == "two_basis"
    s1, s2 = (row.reshape(column) for row in parameters["weight_binarizer.scale"])
    first = sign(w, zero)
    residual = w - s1 * first
    second, clip2 = sign(residual, zero), np.abs(residual) <= 1

    def vjp(g: Array) -> dict[str, Array]:
        rows = [(g * first * (1 - s2 * clip2)).sum(axes), (g * second).sum(axes)]
        return {"weight": g * (s1 * clip + s2 * clip2 * (1 - s1 * clip)), "weight_binarizer.scale": np.stack(rows)}

    return Weights(np.stack([first, second]), np.stack([s1.ravel(), s2.ravel()]), vjp)


class Known(torch.autograd.Function):
    """Values whose vector-Jacobian product, one array for each input, is given."""

    @staticmethod
    def forward(ctx: Any, values: Array, vjp: Callable[[Array], Sequence[Array]], *inputs: Tensor) -> Tensor:
        ctx.vjp = vjp
        return torch.from_numpy(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(torch.from_numpy(g) for g in ctx.vjp(grad.contiguous().numpy()))


def layer(
    form: Form, p: dict[str, Array], x: Array, upstream: Vjp, group: Array, progress: float = 0.0, zero: str = "plus"
) -> tuple[Array, dict[str, Array]]:
    """Return the output and the gradients of ``x`` and of ``p``; ``group`` is (B,), each sample's timestep group."""
    leaves = {"x": x, **{name: value for name, value in p.items() if value.dtype == np.float64}}
    t = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in leaves.items()}
    image = t["x"]

    def rows(name: str) -> Tensor:
        return t[name][torch.from_numpy(np.minimum(group, len(p[name]) - 1))][:, :, None, None]

    def batch_norm(y: Tensor, part: str) -> Tensor:
        return F.batch_norm(y, None, None, t[f"{part}.weight"], t[f"{part}.bias"], training=True, eps=1e-5)

    def post(y: Tensor) -> Tensor:
        if form.post == "hardtanh":
            return F.hardtanh(y)
        assert form.post == "rprelu", form.post
        u = y + rows("post.shift_in")
        return torch.where(u > 0, u, rows("post.slope") * u) + rows("post.shift_out")

    shifted = image
    if form.pre is not None:
        shifted = image + rows("pre.bias") if form.pre == "shift" else batch_norm(image, "pre")
    inputs, vjps = [shifted], []
    if form.activation == "lsq":
        inputs.append(t["activation.step"])
        codes, *vjps = learned_step(form, shifted.detach().numpy(), float(p["activation.step"]))
    else:
        codes, *vjps = activation(form, shifted.detach().numpy(), progress, zero)
    w, learned = weights(form, p, progress, zero), [name for name in ("weight", "weight_binarizer.scale") if name in p]
    w_hat = (w.scales[:, :, None, None, None] * w.codes).sum(0)
    signs = Known.apply(codes, lambda g: [np.asarray(vjp(g)) for vjp in vjps], *inputs)
    filters = Known.apply(w_hat, lambda g: [w.vjp(g)[name] for name in learned], *(t[name] for name in learned))
    y = F.conv2d(signs, filters, padding=1)
    if form.scale == "channel":
        y = y * t["scale.scale"].view(-1, 1, 1)
        if "scale.row_scale" in p:
            y = y * t["scale.row_scale"].view(-1, 1)[: x.shape[2]] * t["scale.column_scale"][: x.shape[3]]
    elif form.scale == "k_map":
        y = y * F.conv2d(image.abs().mean(1, keepdim=True), t["scale.weight"], padding=1)
    elif form.scale == "k_box":
        y = y * F.avg_pool2d(image.detach().abs().mean(1, keepdim=True), 3, 1, 1)
    else:
        assert form.scale is None, form.scale
    if form.norm:
        y = batch_norm(y, "norm")
    if form.post and not form.post_last:
        y = post(y)
    if form.shortcut:
        factor = t["shortcut.factor"] if form.shortcut != "identity" else torch.ones(())
        y = y + (factor.abs() if form.shortcut == "magnitude" else factor) * image
    if form.post and form.post_last:
        y = post(y)
    if form.branch:
        sparse = torch.zeros(w_hat[:, :, 0, 0].size, dtype=torch.float64)
        sparse = sparse.index_put([torch.from_numpy(p["branch.indices"]).long()], t["branch.values"])
        matrix = sparse.view(w_hat.shape[:2]) + t["branch.up"] @ t["branch.down"]
        y = y + torch.einsum("oc,bchw->bohw", matrix, image)
    out = y.detach().numpy()
    y.backward(torch.from_numpy(upstream(out)))
    return out, {name: leaf.grad.numpy() for name, leaf in t.items() if leaf.grad is not None}
