"""Where the timestep is found and what its value means, on the smallest network."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import binarize
from binarize import BinarizeError, Timestep
from binarize.conversion.apply import apply_conversion

K = 5


def network(signature: str, **modules: nn.Module) -> Any:
    """Return a network whose ``forward(self, x, <signature>)`` ignores its other arguments."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj_in = nn.Conv2d(3, 16, 3, padding=1)
            self.body = nn.Conv2d(16, 16, 3, padding=1)
            self.proj_out = nn.Conv2d(16, 3, 3, padding=1)
            for name, module in modules.items():
                self.add_module(name, module)

        def run(self, x: Tensor) -> Tensor:
            return self.proj_out(self.body(self.proj_in(x)))

    scope: dict[str, Any] = {}
    exec(f"def forward(self, x, {signature}):\n    return self.run(x)", scope)
    Net.forward = scope["forward"]  # type: ignore[method-assign]
    return Net()


def image(batch: int) -> Tensor:
    return torch.randn(batch, 3, 4, 4)


def groups_in(model: Any, *args: Any, **kwargs: Any) -> list[int]:
    """Run a forward and return the timestep groups that its binary layer read."""
    seen: list[Tensor] = []
    pre = model.body.pre
    hook = pre.register_forward_hook(lambda *_: seen.append(pre.context.group(K)))
    model(*args, **kwargs)
    hook.remove()
    return seen[0].tolist()


def halves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[1]["time"] / 2


def squared(values: Tensor) -> Tensor:
    return values.square()


CASES: dict[str, tuple[str, Any, Any, list[float], list[int]]] = {
    "steps": ("t", None, None, [0, 199, 200, 999], [0, 0, 1, 4]),
    "unit by name": ("timestep_ratio", None, None, [0, 0.3, 0.5, 1.0], [0, 1, 2, 4]),
    "noise_level by name": ("noise_level", None, None, [1.0, 0.7, 0.5, 0.01], [0, 1, 2, 4]),
    "alpha_bar by name": ("gammas", None, None, [1.0, 0.49, 0.25, 0.0001], [0, 1, 2, 4]),
    "sigma by name": ("sigma", None, None, [0.002, 0.02, 0.4, 80.0], [0, 1, 2, 4]),
    "c_noise by name": ("noise_labels", None, None, [math.log(s) / 4 for s in (0.002, 0.02, 0.4, 80)], [0, 1, 2, 4]),
    "log_snr by name": ("log_snr", None, None, [14.0, 5.0, 0.0, -14.0], [0, 1, 2, 4]),
    "kind": ("time", {"kind": "noise_level"}, None, [0.9, 0.5, 0.1], [0, 2, 4]),
    "name": ("emb, sigmas", "sigmas", None, [0.002, 80.0], [0, 4]),
    "unknown name": ("emb, level", {"argument": "level", "kind": "unit"}, None, [0.0, 0.9], [0, 4]),
    "reversed": ("t", Timestep("t", "unit", (1, 0)), None, [0.0, 0.9], [4, 0]),
    "range": ("sigma", Timestep("sigma", "sigma", (0.03, 14.6)), None, [0.03, 0.66, 14.6], [0, 2, 4]),
    "consistency": ("t", Timestep("t", "log_sigma", (-1553.6, 1095.5)), None, [-1553.0, -200.0, 1095.0], [0, 2, 4]),
    "schedule": ("level", Timestep("level", "noise_level", schedule=(0.99, 0.9, 0.89, 0.88, 0.1)), None,
                 [0.99, 0.91, 0.891, 0.881, 0.2], [0, 1, 2, 3, 4]),
    "short schedule": ("sigma", Timestep("sigma", "sigma", schedule=(0.1, 1.0)), None, [0.1, 1.0], [0, 2]),
    "functions": ("cond", Timestep(halves, squared), lambda t: {"time": t}, [0.2, 1.0, 1.9], [0, 1, 4]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values_reach_the_right_groups(case: str) -> None:
    names, timestep, wrap, values, expected = CASES[case]
    model = binarize.convert(network(names), "bidiffsr", timestep=timestep, num_train_timesteps=1000)
    given = torch.tensor(values)
    args = [given] if wrap is None else [wrap(given)]
    rest = [torch.randn(len(values), 16)] if names.startswith("emb") else []
    assert groups_in(model, image(len(values)), *rest, *args) == expected
    if wrap is None:
        assert groups_in(model, image(2), *rest, **{names.split(", ")[-1]: values[-1]}) == expected[-1:]


@pytest.mark.parametrize(
    ("names", "timestep", "note"),
    [
        ("time", None, r"'time' is taken for steps from 0 to T - 1; .*timestep=binarize.Timestep\(argument='time'"),
        (
            "sigma",
            None,
            r"'sigma' is taken for the standard deviation .*name implies, from 0.002 \(clean\) to 80",
        ),
        ("x2, level", "level", "'level' is taken for steps"),
        ("timestep", None, None),
        ("time", Timestep("time", "unit"), None),
        ("time", {"kind": "steps"}, None),
    ],
)
def test_what_is_assumed_is_noted(names: str, timestep: Any, note: str | None) -> None:
    report = binarize.plan(network(names), "bidiffsr", timestep=timestep, num_train_timesteps=1000)
    assert [bool(re.search(note or "", line)) for line in report.notes] == ([] if note is None else [True])


@pytest.mark.parametrize(
    ("timestep", "values", "message"),
    [
        (None, [0.35, 0.9], r"'time' is read as 'steps' and was 0.35, but steps are whole numbers from 0 to 999"),
        (None, [30.0, 3.5], "was 3.5, but steps"),
        (None, [30, 4000], "was 4000, but steps"),
        (None, [-3, 3], "was -3, but steps"),
        ({"kind": "steps"}, [0.35], "was 0.35, but steps"),
        ({"kind": "noise_level"}, [0.4, 3.0], r"was 3, which is outside the range from 1 \(clean\) to 0 \(noise\)"),
        ({"kind": "sigma"}, [0.0], "was 0, which is outside the range from 0.002"),
        (Timestep("time", squared), [0.5, 2.0], "was 2, whose position 4 is not between 0 and 1"),
        (Timestep("time", "unit"), [float("nan")], "was nan, which"),
    ],
)
def test_one_warning_says_that_values_do_not_fit(timestep: Any, values: list[float], message: str) -> None:
    model = binarize.convert(network("time"), "bidiffsr", timestep=timestep, num_train_timesteps=1000)
    with pytest.warns(UserWarning, match=message):
        model(image(len(values)), torch.tensor(values))
    model(image(len(values)), torch.tensor(values))  # warnings are errors


def test_values_that_fit_do_not_warn() -> None:
    declared = Timestep("time", "steps")  # some samplers take steps in between
    for timestep, values in ((None, [0, 999]), (None, [3.0, 7.0]), (declared, [946.42]), ({"kind": "sigma"}, [100.0])):
        model = binarize.convert(network("time"), "bidiffsr", timestep=timestep, num_train_timesteps=1000)
        model(image(len(values)), torch.tensor(values))


def test_a_network_that_takes_steps_by_another_name_warns_when_it_is_loaded_as_well() -> None:
    model = binarize.convert(network("time"), "bidiffsr", num_train_timesteps=1000)
    again = network("time")
    apply_conversion(again, binarize.conversion.record.conversion(model).to_config())
    with pytest.warns(UserWarning, match="was 3.5"):
        again(image(1), torch.tensor([3.5]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "must be the name of an argument, a binarize.Timestep or a mapping of its fields; got 3"),
        ("tme", r"Net.forward has no argument 'tme'; its arguments: x, time"),
        ({"name": "t"}, "timestep: unknown key 'name'; keys: argument, kind, range, schedule"),
        ({"kind": "sgima"}, "kind must be one of steps, unit, .* got 'sgima'. Did you mean 'sigma'"),
        ({"argument": 3}, "argument must be a name or a function; got 3"),
        ({"kind": "sigma", "range": (1, 0.1)}, r"must be two finite values from clean to noise, .*got \(1.0, 0.1\)"),
        ({"kind": "sigma", "range": (0, 80)}, "must be two finite values"),
        ({"kind": "sigma", "range": (1, 2, 3)}, "must be two finite values"),
        ({"kind": "sigma", "range": "ab"}, "range must consist of numbers; got 'ab'"),
        ({"kind": "steps", "range": (0, 999)}, "a range needs one of the kinds unit, .* got 'steps'"),
        ({"kind": "noise_level", "schedule": range(10)}, "two or more finite values .* 10 values from 0.0 to 9.0"),
        ({"kind": "unit", "range": (0, 1), "schedule": (0, 1)}, "a range or a schedule, not both"),
        ({"kind": "nowhere:f"}, "the kind 'nowhere:f' cannot be imported"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given: Any, message: str) -> None:
    model = network("time")
    with pytest.raises(BinarizeError, match=message):
        binarize.convert(model, "bidiffsr", timestep=given)
    assert "forward" not in vars(model)


def test_a_kind_without_a_place_is_refused() -> None:
    with pytest.raises(BinarizeError, match=r"kind='unit'\) does not say where it is. Net has no timestep.*timestep="):
        binarize.convert(network("cond"), "bidiffsr", timestep={"kind": "unit"})


def test_a_schedule_places_every_step_in_the_group_of_its_index() -> None:
    from diffusers import DDPMScheduler

    levels = DDPMScheduler(2000, beta_start=1e-6, beta_end=1e-2).alphas_cumprod.sqrt()
    model = binarize.convert(network("time"), "bidiffsr", timestep=Timestep("time", "noise_level", schedule=levels))
    found = groups_in(model, image(2000), levels)
    assert found == [step * K // 2000 for step in range(2000)]


@pytest.mark.parametrize(
    "timestep",
    [
        {"kind": "noise_level"},
        {"argument": "time", "kind": "sigma", "range": (0.01, 50)},
        Timestep("time", "unit", schedule=(0, 0.5, 0.9)),
    ],
)
def test_the_timestep_is_saved_with_the_model(tmp_path: Any, timestep: Any) -> None:
    model = binarize.convert(network("time").eval(), "bidiffsr", timestep=timestep)
    with torch.no_grad():
        model.body.pre.bias.normal_()
    again = binarize.load(binarize.save(model, tmp_path), model=network("time").eval())
    assert again.body.pre.context.timestep == model.body.pre.context.timestep
    inputs = image(3), torch.tensor([0.1, 0.5, 0.9])
    assert torch.equal(model(*inputs), again(*inputs))


def test_models_of_version_0_1_keep_their_reading() -> None:
    config = {"format": 1, "method": "bidiffsr", "structure": "keep", "num_train_timesteps": 1000}
    model = network("sigma")
    apply_conversion(model, config)
    assert groups_in(model, image(2), torch.tensor([3, 999])) == [0, 4]
    assert binarize.conversion.record.conversion(model).to_config().keys() & {"timestep"} == set()


def test_functions_are_saved_by_path_and_loaded_only_if_a_host_gives_them(tmp_path: Any) -> None:
    class Other(binarize.hosts.Host):
        @classmethod
        def matches(cls, model: nn.Module) -> bool:
            return hasattr(model, "marked")

        def timestep(self, model: nn.Module) -> Timestep:
            return Timestep("time", torch.sigmoid)

    def marked() -> Any:
        return network("time", marked=nn.Identity())

    folder = binarize.save(binarize.convert(marked(), "bidiffsr", timestep=Timestep("time", math_position)), tmp_path)
    with pytest.raises(BinarizeError, match=r"names the function .*math_position.*may not have functions called"):
        binarize.load(folder, model=marked())
    Other.timestep = lambda self, model: Timestep("time", math_position)  # type: ignore[method-assign]
    binarize.register_host("marked")(Other)
    assert binarize.load(folder, model=marked()).body.pre.context.timestep.kind is math_position
    with pytest.raises(BinarizeError, match=r"the timestep's kind .*<lambda>.* cannot be saved"):
        binarize.save(binarize.convert(network("time"), "bidiffsr", timestep=Timestep("time", lambda v: v)), tmp_path)


def math_position(values: Tensor) -> Tensor:
    return torch.sin(values)


def projecting(call: Callable[[Any, Tensor, Any], Tensor], projection: nn.Module) -> Any:
    model = network("time=None", time_proj=projection)
    plain = type(model).forward

    def forward(self: Any, x: Tensor, time: Any = None) -> Tensor:
        call(self, x, time)
        return plain(self, x, time)

    type(model).forward = forward
    return model


def test_a_time_proj_is_trusted_only_with_one_timestep_for_each_sample() -> None:
    features = projecting(lambda s, x, t: s.time_proj(torch.randn(len(x), 8)), nn.Linear(8, 8))
    binarize.convert(features, "bidiffsr", num_train_timesteps=1000)
    assert features(image(1), torch.tensor([3])).shape == (1, 3, 4, 4)
    assert groups_in(features, image(2), torch.tensor([3, 900])) == [0, 4]
    scaled = projecting(lambda s, x, t: s.time_proj(t * 1000), nn.Identity())
    binarize.convert(scaled, "bidiffsr", num_train_timesteps=1000)
    assert groups_in(scaled, image(2), torch.tensor([0.1, 0.5])) == [0, 2]
    assert groups_in(scaled, image(2), torch.tensor(0.5)) == [2]


def test_a_missing_timestep_says_so() -> None:
    model = binarize.convert(network("time=None"), "bidiffsr")
    with pytest.raises(BinarizeError, match=r"Net.forward ran without a timestep: argument 'time' is missing; pass it"):
        model(image(1))
    with pytest.raises(BinarizeError, match="argument 'time' is None"):
        model(image(1), None)
    with pytest.raises(BinarizeError, match="got a dict as timestep; pass a tensor or a number"):
        model(image(1), {"a": 1})
    only = network("cond", time_proj=nn.Linear(8, 8))
    with pytest.raises(BinarizeError, match="`time_proj` was not called with one timestep for each sample"):
        binarize.convert(only, "bidiffsr")(image(1), 3)
    read = binarize.convert(network("cond"), "bidiffsr", timestep=Timestep(lambda args, kwargs: None, "unit"))
    with pytest.raises(BinarizeError, match="<lambda> returned None"):
        read(image(1), 3)


def test_defaults_and_keyword_arguments_are_read() -> None:
    model = binarize.convert(network("*, cond=None, time=700"), "bidiffsr", num_train_timesteps=1000)
    assert groups_in(model, image(2)) == [3]
    assert groups_in(model, image(2), time=100) == [0]
    open_ended = binarize.convert(network("**conditions"), "bidiffsr", timestep=Timestep("step", "steps"))
    assert groups_in(open_ended, image(2), step=torch.tensor([999, 0])) == [4, 0]


def test_a_batch_that_is_no_multiple_of_the_timesteps_is_refused() -> None:
    model = binarize.convert(network("time"), "bidiffsr")
    for form in (model, binarize.pack(model)):
        with pytest.raises(BinarizeError, match="got a batch of 3, but the forward pass has 2 timesteps; it must be a"):
            form(image(3), torch.tensor([1, 2]))


@pytest.mark.parametrize("norm", [None, "batch_norm"])  # runs as one node, or as modules
def test_folded_batches_equal_repeated_timesteps(norm: str | None) -> None:
    method = binarize.get_method("bidiffsr").replace(norm=norm)
    model = binarize.convert(network("time").double(), method, num_train_timesteps=1000).eval()
    with torch.no_grad():
        for parameter in model.body.parameters():
            parameter.normal_()
    x, t = image(6).double(), torch.tensor([3, 900])
    for form in (model, binarize.pack(model)):
        folded, repeated = form(x, t), form(x, t.repeat_interleave(3))
        assert torch.equal(folded, repeated)
        assert not torch.equal(folded, form(x, t.repeat(3)))
