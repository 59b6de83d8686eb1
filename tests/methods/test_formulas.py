"""Values and gradients of every method's parts and layers, against closed forms in numpy."""

import numpy as np
import pytest
import torch
from closed_forms import activation, layer, learned_step, sign, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from method_cases import CASES, DEFAULTS, METHODS, Case
from torch import Tensor

import binarize
from binarize.layers import BinaryConv2d
from binarize.timestep import TimestepContext

T = 100
CHANNELS, SIZE = 4, 5
PROGRESS = (0.0, 0.37, 1.0)
BOTH_ZEROS = [(case, "plus") for case in CASES] + [(case, "zero") for case in DEFAULTS]
both_zeros = pytest.mark.parametrize(("case", "zero"), BOTH_ZEROS, ids=str)

# Zeros of both signs, every threshold, and values on either side of it.
TIES = st.sampled_from([0.0, -0.0, 0.25, 0.5, -0.5, 1.0, -1.0, 1.0 + 2**-52, -1.0 - 2**-52, 2.0])
NUMBERS = st.one_of(TIES, st.floats(-3, 3).map(lambda x: round(x, 6)))


def tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(x, dtype=np.float64))


def same(actual: Tensor, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual.detach(), tensor(np.asarray(expected)), rtol=tolerance, atol=tolerance)


def build(case: Case, progress: float = 0.0, zero: str = "plus") -> BinaryConv2d:
    method = case.method.replace(sign_zero=zero)
    made = BinaryConv2d(CHANNELS, CHANNELS, 3, padding=1, method=method, context=TimestepContext(T)).double()
    binarize.training_step(made, progress)
    return made


def test_every_registered_method_has_a_closed_form():
    assert sorted(case.name for case in DEFAULTS) == sorted(METHODS), "write its Form in method_cases.py"


@both_zeros
@settings(max_examples=10)
@given(values=arrays(np.float64, (2, 1, 2, 3), elements=NUMBERS), upstream=st.integers(0, 2**31))
def test_activation_values_and_surrogate_gradient(case, zero, values, upstream):
    g = np.random.default_rng(upstream).normal(size=values.shape)
    for progress in PROGRESS:
        made = build(case, progress, zero).activation
        x = tensor(values).requires_grad_()
        if case.form.activation == "lsq":
            made.step.data.fill_(0.25)
        codes = made(x)
        codes.backward(tensor(g))
        if case.form.activation == "lsq":
            expected, vjp, step_vjp = learned_step(case.form, values, 0.25)
            same(made.step.grad, step_vjp(g))
        else:
            expected, vjp = activation(case.at(progress), values, progress, zero)
        gradient = vjp(g)
        if case.form.activation == "mean":  # the magnitude is the scale's business, in values and gradient
            mean = np.abs(values).mean(axis=(1, 2, 3), keepdims=True)
            expected = sign(values, zero)
            gradient = np.where(mean == 0, 0.0, gradient / np.where(mean == 0, 1, mean))
        same(codes, expected, 0)
        same(x.grad, gradient)
        if zero == "plus" and made.levels is not None:
            assert set(codes.unique().tolist()) <= set(made.levels)


@both_zeros
@settings(max_examples=10)
@given(data=st.data(), upstream=st.integers(0, 2**31))
def test_weight_codes_scales_and_gradient(case, zero, data, upstream):
    rng = np.random.default_rng(upstream)
    # Ties, in a filter that is not constant: IR-Net divides by its deviation.
    w = data.draw(arrays(np.float64, (2, 3, 1, 2), elements=NUMBERS)) + 0.0
    w[:, 0, 0] = rng.normal(size=(2, 2))
    g = rng.normal(size=w.shape)
    binarizer = build(Case(case.name, case.form, case.options), 0, zero).weight_binarizer
    if case.form.weight == "two_basis":
        binarizer = type(binarizer)(tensor(w), zero).double()
        binarizer.scale.data += tensor(rng.normal(size=(2, 2)) / 10)
    for progress in PROGRESS:
        binarize.training_step(binarizer, progress)
        parameters = {f"weight_binarizer.{k}": v.detach().numpy() for k, v in binarizer.named_parameters()}
        expected = weights(case.at(progress), {"weight": w, **parameters}, progress, zero)
        latent = tensor(w).requires_grad_()
        binary = binarizer(latent)
        same(binary.codes, expected.codes, 0)
        same(binary.scales, expected.scales)
        if zero == "plus" and case.at(progress).weight != "real":
            assert set(binary.codes.unique().tolist()) <= {-1, 1}
        binarizer.zero_grad()
        (binary.surrogate * tensor(g)).sum().backward()
        found = {"weight": latent.grad, **{f"weight_binarizer.{k}": v.grad for k, v in binarizer.named_parameters()}}
        wanted = expected.vjp(g)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            same(found[name], value)


@both_zeros
@settings(max_examples=4)
@given(seed=st.integers(0, 2**31), progress=st.sampled_from(PROGRESS))
def test_whole_layer_and_all_its_gradients(case, zero, seed, progress):
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        ties = rng.choice([0.0, 0.5, -0.5, 1.0, -1.0], size=shape)
        return np.where(rng.random(shape) < 0.2, ties, rng.normal(size=shape))

    made = build(case, progress, zero)
    for name, parameter in made.named_parameters():
        value = draw(*parameter.shape) if name == "weight" else 0.5 + 0.3 * rng.normal(size=parameter.shape)
        if name == "activation.step":
            value = 0.1 + np.abs(value)  # the closed form is of positive steps
        parameter.data.copy_(tensor(value))
    p = {name: parameter.detach().numpy().copy() for name, parameter in made.named_parameters()}
    p.update({name: b.numpy() for name, b in made.named_buffers() if name == "branch.indices"})
    x, t = draw(3, CHANNELS, SIZE, SIZE), rng.integers(0, T, size=3)
    weighting = rng.normal(size=x.shape)
    group = np.array([int(v * case.method.groups / T) for v in t])
    y, grads = layer(case.at(progress), p, x, lambda y: weighting * y, group, progress, zero)

    inputs = tensor(x).requires_grad_()
    context = TimestepContext(T)
    for module in made.modules():
        if hasattr(module, "context"):
            module.context = context
    with context.using(torch.from_numpy(t)):
        out = made(inputs)
    same(out, y)
    (out.square() * tensor(weighting)).sum().div(2).backward()
    assert {name for name, _ in made.named_parameters()} | {"x"} == grads.keys()
    same(inputs.grad, grads.pop("x"))
    for name, parameter in made.named_parameters():
        same(parameter.grad, grads[name])
