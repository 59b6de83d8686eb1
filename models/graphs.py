"""CUDA graphs of the passes in one call of a pipeline.

A pass launches hundreds of kernels, and for small images the GPU waits for Python to launch them. A CUDA graph launches
all of them at once. It keeps the Python values of the recorded pass. Therefore it lives for one call of a pipeline,
within which only tensors change, and it is used after its results have been compared with the network's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from binarize.kernels.capture import is_captured
from binarize.timestep import TimestepContext

Pass = Callable[..., Tensor]
LEAST_CALLS = 16  # a graph costs about seven calls
MOST_PIXELS = 1 << 19  # of a batch; a larger one keeps a GPU busy while Python launches the next kernels
_log = logging.getLogger("binarize")
_on_pass: ContextVar[Callable[[], object] | None] = ContextVar("on_pass", default=None)


@contextmanager
def counting(on_pass: Callable[[], object] | None) -> Iterator[None]:
    """Call ``on_pass`` after each pass of a network in the pipelines that this thread calls."""
    token = _on_pass.set(on_pass)
    try:
        yield
    finally:
        _on_pass.reset(token)


class GraphedPasses:
    """Calls a function of tensors, and on a GPU replays a graph of it once that gives the same bits.

    The first call runs the function, which compiles its kernels. The second one records a graph, and compares it with
    the function for its own inputs, and for other images at each of the ``probes``. If recording fails or a bit
    differs, the other calls run the function. So do calls with inputs of other shapes.

    Args:
        function: Takes a timestep, a scalar tensor, and images ``(B, C, H, W)``; returns images.
        network: The network that the function calls.
        probes: Timesteps at which the graph is compared, such as the first and the last.
        calls: How many calls there will be; with fewer than `LEAST_CALLS`, or with batches of more than `MOST_PIXELS`
            pixels, no graph is recorded.
    """

    def __init__(self, function: Pass, network: nn.Module, probes: Sequence[Tensor], calls: int) -> None:
        self._function, self._network, self._probes, self._calls = function, network, probes, calls
        self._shapes: list[object] | None = None
        self._graph: Pass | None = None

    def __call__(self, timestep: Tensor, *images: Tensor) -> Tensor:
        """Return the function's result, a new tensor."""
        result = self._passed((timestep, *images))
        if (on_pass := _on_pass.get()) is not None:
            on_pass()
        return result

    def _passed(self, inputs: tuple[Tensor, ...]) -> Tensor:
        if self._calls < LEAST_CALLS or _pixels(inputs[1]) > MOST_PIXELS or not share_a_gpu(inputs):
            return self._function(*inputs)
        shapes: list[object] = [(each.shape, each.dtype) for each in inputs]
        if self._shapes is None and runs_alone(self._network):
            self._shapes = shapes
        elif self._shapes == shapes:
            if self._graph is None:
                self._graph = self._recorded(inputs) or self._function
            return self._graph(*inputs)
        return self._function(*inputs)

    def _recorded(self, inputs: tuple[Tensor, ...]) -> Pass | None:
        others = [image.flip(-1) for image in inputs[1:]]
        try:
            graph = record(self._function, inputs)
            for case in (inputs, *((probe, *others) for probe in self._probes)):
                expected = self._function(*case)
                if not torch.equal(graph(*case), expected):
                    if bool(expected.isfinite().all()):
                        name = type(self._network).__name__
                        _log.warning("%s gives other results in a CUDA graph, and runs without one.", name)
                    return None
        except RuntimeError as error:  # such as a network that reads a value from the GPU, or too little memory
            _log.info("%s runs without a CUDA graph: %s", type(self._network).__name__, error)
            return None
        return graph


def _pixels(images: Tensor) -> int:
    return images.shape[0] * images.shape[-2] * images.shape[-1]


def share_a_gpu(inputs: Sequence[Tensor]) -> bool:
    """Return whether all tensors are on one GPU."""
    return all(each.is_cuda and each.device == inputs[0].device for each in inputs)


def runs_alone(network: nn.Module) -> bool:
    """Return whether nothing but a network takes part in its calls: no hook, offloading, compiler or autocast."""
    if is_captured() or torch.is_autocast_enabled("cuda"):
        return False
    return not any(_is_watched(module) or _is_wrapped(module) for module in network.modules())


def _is_wrapped(module: nn.Module) -> bool:
    """Return whether accelerate or torch.compile replaced a module's call."""
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return compiled or hasattr(module, "_hf_hook")


def _is_watched(module: nn.Module) -> bool:
    """Return whether a module has other hooks than those that tell layers the timestep."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not isinstance(getattr(hook, "__self__", None), TimestepContext) for hook in hooks)


def record(function: Pass, inputs: Sequence[Tensor]) -> Pass:
    """Return a function that replays a CUDA graph of ``function(*inputs)`` with other inputs of the same shapes."""
    with torch.cuda.device(inputs[0].device):
        given = [each.clone() for each in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set up their memory here, outside the graph's
            function(*given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU
            result = function(*given)

    def replay(*others: Tensor) -> Tensor:
        for place, each in zip(given, others, strict=True):
            place.copy_(each)
        graph.replay()
        return result.clone()

    return replay
