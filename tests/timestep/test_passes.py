"""The timestep of each forward pass: however the model is called, copied, compiled, threaded or checkpointed."""

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import binarize
from binarize import BinarizeError

T, K = 1000, 5
Block = Callable[..., Tensor]


class Net(nn.Module):
    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1))
        self.proj_out = nn.Conv2d(16, 3, 3, padding=1)
        self.run_block = run

    def forward(self, x: Tensor, time: Any = None) -> Tensor:
        h = self.proj_in(x)
        return self.proj_out(self.body(h) if self.run_block is None else self.run_block(self.body, h))


def converted(run: Any = None, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = binarize.convert(Net(run).double(), "bidiffsr", num_train_timesteps=T)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TIMES = (torch.tensor([3, 900]), torch.tensor([500, 500]), torch.tensor([250, 10]))


def test_forward_called_directly_reads_the_timestep_of_each_pass() -> None:
    model = converted()
    for t in TIMES:
        assert torch.equal(model.forward(X, t), model(X, t))
        assert torch.equal(model.forward(X, time=t), model(X, t))
    with pytest.raises(BinarizeError, match="argument 'time' is missing"):
        model.forward(X)  # nothing is kept from an earlier pass
    assert list(inspect.signature(model.forward).parameters) == ["x", "time"]


def test_a_host_with_time_proj_reads_each_pass_too() -> None:
    from hosts_zoo import srunet

    model = binarize.convert(srunet().double().eval(), "bidiffsr")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        outs = [model.forward(x, t, x).sample for t in TIMES]
        for t, out in zip(TIMES, outs, strict=True):
            assert torch.equal(model(x, t, x).sample, out)
    assert not torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(copied: Callable[[Net], Net]) -> None:
    model = converted()
    twin = copied(model)
    assert torch.equal(twin.forward(X, TIMES[0]), model(X, TIMES[0]))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert (twin.forward(X, TIMES[0]) == 0).all()
    assert (twin(X, TIMES[0]) == 0).all()
    assert not (model.forward(X, TIMES[0]) == 0).all()
    assert twin.body[0].pre.context is twin.body[1].pre.context is not model.body[0].pre.context  # type: ignore[union-attr]


def test_revert_restores_forward_also_one_that_was_replaced_before() -> None:
    model = converted()
    assert "forward" not in vars(binarize.revert(model))

    patched = Net()
    plain = patched.forward
    patched.forward = mine = lambda x, time: plain(2 * x, time)  # type: ignore[method-assign]
    binarize.convert(patched, "bidiffsr")
    assert torch.equal(patched(X.float(), 3), patched.forward(X.float(), 3))
    assert vars(binarize.revert(patched))["forward"] is mine


def test_another_wrapper_may_come_after_ours() -> None:
    model = converted()
    expected, ours = model(X, TIMES[0]), model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)  # type: ignore[method-assign]  # as accelerate does
    assert torch.equal(model(X, TIMES[0]), expected)


@pytest.mark.long
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_and_exported_graphs_take_the_timestep_as_an_input(packed: bool) -> None:
    model = converted().eval()
    model = binarize.pack(model) if packed else model
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        exported = torch.export.export(model, (X, TIMES[0])).module()
        for t in TIMES:
            assert torch.equal(compiled(X, t), model(X, t))
            assert torch.equal(exported(X, t), model(X, t))
        block = torch.compile(model.body, fullgraph=True, backend="eager")  # a part alone, as regional compilation does
        h = model.proj_in(X)
        for t in TIMES:
            with binarize.timesteps(model, t):
                assert torch.equal(block(h), model.body(h))


def test_a_pass_within_a_block_restores_the_timestep_of_the_block() -> None:
    model = converted()
    h = model.proj_in(X)
    with binarize.timesteps(model, TIMES[0]):
        before = model.body(h)
        model(X, TIMES[1])
        assert torch.equal(model.body(h), before)


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    """Run functions at the same time, and return what they return."""
    results: list[Any] = [None] * len(work)
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(work))

    def run(i: int) -> None:
        try:
            barrier.wait()
            results[i] = work[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def meeting(count: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return a way to run a block that waits until all threads are within their forward pass."""
    barrier = threading.Barrier(count)

    def run(body: nn.Module, h: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            barrier.wait(10)
        return body(h)

    return run


@pytest.mark.parametrize("packed", [False, True])
def test_threads_that_share_a_model_have_timesteps_of_their_own(packed: bool) -> None:
    model = converted(meeting(3)).eval()
    model = binarize.pack(model) if packed else model
    with torch.no_grad():
        expected = [model(X, t) for t in TIMES]

    def run(t: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [model(X, t) for _ in range(10)]

    for found, one in zip(in_threads(*(lambda t=t: run(t) for t in TIMES)), expected, strict=True):
        assert all(torch.equal(each, one) for each in found)


def test_replicas_of_data_parallel_use_their_own_parameters_and_timesteps() -> None:
    def replica_of(module: nn.Module) -> Any:
        """Return what torch.nn.parallel.replicate makes: a shallow copy with parameters of its own."""
        replica = module._replicate_for_data_parallel()  # type: ignore[operator]
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else replica_of(child))
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1.5)
        return replica

    model = converted()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter *= 1.5
    replicas = [replica_of(model) for _ in TIMES]
    outs = in_threads(*(lambda r=r, t=t: r(X, t) for r, t in zip(replicas, TIMES, strict=True)))
    for out, t in zip(outs, TIMES, strict=True):
        torch.testing.assert_close(out, scaled(X, t), rtol=0, atol=0)
    outs[0].sum().backward()
    assert model.body[0].weight.grad is not None


class Recomputing(torch.autograd.Function):
    """A checkpoint of its own, as guided-diffusion and latent-diffusion have it."""

    @staticmethod
    def forward(ctx: Any, block: Block, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.block, ctx.x, ctx.parameters = block, x, parameters
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.block(x)
        return None, *torch.autograd.grad(out, (x, *ctx.parameters), gradient)


def recomputing(body: nn.Module, h: Tensor) -> Tensor:
    out: Tensor = Recomputing.apply(body, h, *body.parameters())
    return out


def reentrant(body: nn.Module, h: Tensor) -> Tensor:
    return checkpoint(body, h, use_reentrant=True)


@pytest.mark.parametrize("run", [recomputing, reentrant])
def test_checkpointing_of_other_kinds_works_within_a_block(run: Any) -> None:
    plain, saver = converted(), converted(run)
    for model in (plain, saver):
        loss = model(X, TIMES[0]).square().sum()
        with binarize.timesteps(model, TIMES[0]):
            loss.backward()
    for (name, expected), found in zip(plain.named_parameters(), saver.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=name)


@pytest.mark.parametrize("run", [recomputing, reentrant])
def test_checkpointing_of_other_kinds_says_what_to_do(run: Any) -> None:
    loss = converted(run)(X, TIMES[0]).sum()
    with pytest.raises(
        BinarizeError, match=r"recomputed in the backward pass.*`with binarize.timesteps\(model, t\): loss"
    ):
        loss.backward()


def test_a_backward_thread_takes_the_timestep_of_the_only_block() -> None:
    """CUDA's backward pass runs in threads of autograd; here, a hook moves the recomputation to another one."""
    model = converted()
    context, seen = model.body[0].pre.context, []  # type: ignore[union-attr]

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            context._slot.running = None  # as in a thread that has run nothing
            seen.append(context.group(K).tolist())
            return gradient

    loss = Probe.apply(torch.ones(1, requires_grad=True)).sum()
    with binarize.timesteps(model, TIMES[0]):
        loss.backward(retain_graph=True)
    assert seen == [[0, 4]]
    with binarize.timesteps(model, TIMES[0]), binarize.timesteps(model, TIMES[1]):
        loss.backward(retain_graph=True)
    assert seen == [[0, 4], [2, 2]]

    both, done = threading.Barrier(2), threading.Event()

    def hold() -> None:
        with binarize.timesteps(model, TIMES[1]):
            both.wait()
            done.wait()

    def run() -> None:
        with binarize.timesteps(model, TIMES[0]):
            both.wait()
            with pytest.raises(BinarizeError, match=r"2 threads run binarize.timesteps\(...\) for one model"):
                loss.backward()
            done.set()

    in_threads(hold, run)
