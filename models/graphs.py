"""CUDA graphs of the passes in one call of a pipeline.

A pass launches hundreds of kernels. For small images the GPU waits for Python to launch them; a graph launches all of
them at once. It keeps whatever the pass read from Python, so it lives for one call only, in which a pipeline changes
nothing but the tensors that it gives to the network, and is used after it has given the network's results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from binarize.kernels.capture import is_captured
from binarize.layers.declared import is_hooked

Pass = Callable[..., Tensor]
LEAST_CALLS = 8  # a graph costs about four calls
_log = logging.getLogger("binarize")


class GraphedPasses:
    """Calls a function of tensors; on a GPU, later calls of the same shapes replay a graph of an earlier one.

    The first call of some shapes runs the function, which compiles its kernels. The second one records a graph, and
    compares it with the function for its own inputs, and for other images at each of the ``probes``. If a bit differs,
    or recording fails, all calls run the function.

    Args:
        function: Takes a timestep, a scalar tensor, and images ``(B, C, H, W)``; returns images.
        network: The network that the function calls.
        probes: Timesteps at which graphs are compared, such as the first and the last.
        calls: How many calls there will be; fewer than `LEAST_CALLS` are not worth a graph.
    """

    def __init__(self, function: Pass, network: nn.Module, probes: Sequence[Tensor], calls: int) -> None:
        self._function, self._network, self._probes, self._calls = function, network, probes, calls
        self._graphs: dict[tuple[object, ...], Pass | None] = {}  # None: called once

    def __call__(self, timestep: Tensor, *images: Tensor) -> Tensor:
        """Return the function's result, a new tensor."""
        inputs = (timestep, *images)
        key = tuple((each.shape, each.dtype) for each in inputs)
        graph = self._graphs.get(key)
        if graph is not None:
            return graph(*inputs)
        if self._calls >= LEAST_CALLS and can_record(self._network, inputs):
            if key in self._graphs:
                graph = self._graphs[key] = self._recorded(inputs)
                return graph(*inputs)
            self._graphs[key] = None
        return self._function(*inputs)

    def _recorded(self, inputs: tuple[Tensor, ...]) -> Pass:
        try:
            graph = record(self._function, inputs)
        except RuntimeError as error:  # such as one that waits for the GPU, or too little memory
            _log.debug("No CUDA graph: %s", error)
            return self._function
        others = [image.flip(-1) for image in inputs[1:]]
        for case in (inputs, *((probe, *others) for probe in self._probes)):
            if not torch.equal(graph(*case), self._function(*case)):
                _log.warning(
                    "The network does not give the same results in a CUDA graph, and runs without one. To silence "
                    "this, set cuda_graphs=False on the pipeline."
                )
                return self._function
        return graph


def can_record(network: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Return whether all inputs are on one GPU, and nothing but the network takes part in its calls."""
    if not all(each.is_cuda and each.device == inputs[0].device for each in inputs):
        return False
    if is_captured() or torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing():
        return False
    compiled = hasattr(network, "_orig_mod")
    return not compiled and not any(is_hooked(m) or hasattr(m, "_hf_hook") for m in network.modules())


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
