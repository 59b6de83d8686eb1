"""Binary layers written out in numpy, forward and backward by hand: what the methods are checked against.

Nothing here uses the toolkit or automatic differentiation. A `Form` says what a method computes, taken from its paper
and released code; `layer` evaluates a 3x3 convolution of that form (stride 1, one pixel of padding) and every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

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


def activation(form: Form, x: Array, progress: float = 0.0, zero: str = "plus") -> tuple[Array, Vjp]:
    """Return the activation's values and its vector-Jacobian product; one sample per first index."""
    hat = sign(x, zero)
    slopes: dict[str, Callable[[], Any]] = {
        "ste": lambda: np.abs(x) <= 1,
        "identity": lambda: 1,
        "approx": lambda: np.maximum(0, 2 - 2 * np.abs(x)),
        "ede": lambda: ede(x, ede_t(form, progress)),
    }
    if form.activation in slopes:
        return hat, lambda g: g * slopes[form.activation]()
    if form.activation == "round":
        return np.where(x > 0.5, 1.0, 0.0), lambda g: g * ((x >= 0) & (x <= 1))
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


def taps(x: Array) -> list[tuple[int, int, Array]]:
    """Every tap of a 3x3 kernel with the part of the image that it sees, zeros outside."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    h, w = x.shape[2:]
    return [(i, j, padded[:, :, i : i + h, j : j + w]) for i in range(3) for j in range(3)]


def convolve(x: Array, w: Array) -> Array:
    return sum(np.einsum("bchw,oc->bohw", seen, w[:, :, i, j]) for i, j, seen in taps(x))


def convolve_back(x: Array, w: Array, g: Array) -> tuple[Array, Array]:
    gw, gx = np.zeros_like(w), np.zeros((x.shape[0], x.shape[1], x.shape[2] + 2, x.shape[3] + 2))
    for i, j, seen in taps(x):
        gw[:, :, i, j] = np.einsum("bohw,bchw->oc", g, seen)
        gx[:, :, i : i + x.shape[2], j : j + x.shape[3]] += np.einsum("bohw,oc->bchw", g, w[:, :, i, j])
    return gx[:, :, 1:-1, 1:-1], gw


def batch_norm(x: Array, gamma: Array, beta: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    axes, n = (0, 2, 3), x.size // x.shape[1]
    deviation = np.sqrt(x.var(axis=axes, keepdims=True) + 1e-5)
    normal = (x - x.mean(axis=axes, keepdims=True)) / deviation
    gamma = gamma.reshape(1, -1, 1, 1)

    def vjp(g: Array) -> tuple[Array, Array, Array]:
        mean, along = g.mean(axis=axes, keepdims=True), (g * normal).sum(axis=axes, keepdims=True) / n
        return gamma / deviation * (g - mean - normal * along), (g * normal).sum(axis=axes), g.sum(axis=axes)

    return normal * gamma + beta.reshape(1, -1, 1, 1), vjp


def rows(parameter: Array, group: Array) -> Array:
    return parameter[np.minimum(group, len(parameter) - 1)][:, :, None, None]


def row_gradient(parameter: Array, group: Array, g: Array) -> Array:
    out = np.zeros_like(parameter)
    np.add.at(out, np.minimum(group, len(parameter) - 1), g.sum(axis=(2, 3)))
    return out


def layer(
    form: Form, p: dict[str, Array], x: Array, upstream: Vjp, group: Array, progress: float = 0.0, zero: str = "plus"
) -> tuple[Array, dict[str, Array]]:
    """Return the output and the gradients of ``x`` and of every parameter in ``p``.

    ``upstream`` gives the gradient of the output. ``group`` is (B,), each sample's timestep group.
    """
    back: list[Callable[[Any], Any]] = []
    grads: dict[str, Array] = {"x": np.zeros_like(x)}

    shifted, pre_back = x, None
    if form.pre == "shift":
        shifted = x + rows(p["pre.bias"], group)
    elif form.pre == "batch_norm":
        shifted, pre_back = batch_norm(x, p["pre.weight"], p["pre.bias"])
    codes, activation_back = activation(form, shifted, progress, zero)
    w = weights(form, p, progress, zero)
    y = sum(scale.reshape(1, -1, 1, 1) * convolve(codes, code) for scale, code in zip(w.scales, w.codes, strict=True))
    w_hat = sum(scale.reshape(-1, 1, 1, 1) * code for scale, code in zip(w.scales, w.codes, strict=True))

    g_shifted = np.zeros_like(x)

    def product_back(g: Array) -> None:
        nonlocal g_shifted
        g_codes, g_hat = convolve_back(codes, w_hat, g)
        grads.update(w.vjp(g_hat))
        g_shifted = g_shifted + activation_back(g_codes)

    back.append(product_back)
    if form.scale == "channel":
        factors = {"scale.scale": p["scale.scale"].reshape(1, -1, 1, 1)}
        if "scale.row_scale" in p:
            factors["scale.row_scale"] = p["scale.row_scale"].reshape(-1, 1)[: x.shape[2]]
            factors["scale.column_scale"] = p["scale.column_scale"][: x.shape[3]]
        whole, product = math.prod(factors.values()), y

        def scale_back(g: Array) -> Array:
            for name, factor in factors.items():
                moved = g * product * whole / factor
                axes = {"scale.scale": (0, 2, 3), "scale.row_scale": (0, 1, 3), "scale.column_scale": (0, 1, 2)}[name]
                flat = np.zeros(p[name].size)
                flat[: moved.sum(axes).size] = moved.sum(axes)
                grads[name] = flat.reshape(p[name].shape)
            return g * whole

        y = y * whole
        back.append(scale_back)
    elif form.scale == "k_map":
        magnitude, kernel, plain = np.abs(x).mean(1, keepdims=True), p["scale.weight"], y
        k_map = convolve(magnitude, kernel)

        def map_back(g: Array) -> Array:
            g_magnitude, grads["scale.weight"] = convolve_back(magnitude, kernel, (g * plain).sum(1, keepdims=True))
            grads["x"] = grads["x"] + g_magnitude * np.sign(x) / x.shape[1]
            return g * k_map

        y = y * k_map
        back.append(map_back)
    if form.norm:
        y, normal_back = batch_norm(y, p["norm.weight"], p["norm.bias"])

        def norm_back(g: Array) -> Array:
            g, grads["norm.weight"], grads["norm.bias"] = normal_back(g)
            return g

        back.append(norm_back)

    def post(y: Array) -> Array:
        if form.post == "hardtanh":
            back.append(lambda g, y=y: g * (np.abs(y) < 1))
            return np.clip(y, -1, 1)
        u, slope = y + rows(p["post.shift_in"], group), rows(p["post.slope"], group)

        def post_back(g: Array) -> Array:
            grads["post.shift_out"] = row_gradient(p["post.shift_out"], group, g)
            grads["post.slope"] = row_gradient(p["post.slope"], group, g * np.minimum(u, 0))
            g = g * np.where(u > 0, 1, slope)
            grads["post.shift_in"] = row_gradient(p["post.shift_in"], group, g)
            return g

        back.append(post_back)
        return np.where(u > 0, u, slope * u) + rows(p["post.shift_out"], group)

    if form.post and not form.post_last:
        y = post(y)
    if form.shortcut:
        factor = p["shortcut.factor"] if form.shortcut != "identity" else np.array(1.0)
        used = np.abs(factor) if form.shortcut == "magnitude" else factor

        def shortcut_back(g: Array) -> Array:
            grads["x"] = grads["x"] + g * used
            if form.shortcut != "identity":
                grads["shortcut.factor"] = (g * x).sum() * (np.sign(factor) if form.shortcut == "magnitude" else 1)
            return g

        y = y + used * x
        back.append(shortcut_back)
    if form.post and form.post_last:
        y = post(y)

    g: Any = upstream(y)
    for step in reversed(back):
        g = step(g)
    if form.pre == "shift":
        grads["pre.bias"] = row_gradient(p["pre.bias"], group, g_shifted)
    elif pre_back is not None:
        g_shifted, grads["pre.weight"], grads["pre.bias"] = pre_back(g_shifted)
    grads["x"] = grads["x"] + g_shifted
    return y, grads
