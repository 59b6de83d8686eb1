"""Modules of any network: find them by name pattern, replace them, copy their structure and their tensors."""

import copy
import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from binarize.errors import BinarizeError

ModelT = TypeVar("ModelT", bound=nn.Module)

# The classes that wrap a whole model, and where they hold it.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile and of data parallelism."""
    while (held := WRAPPERS.get(type(model).__name__)) is not None:
        model = getattr(model, held)
    return model


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise BinarizeError if a process holds only a part of the model's parameters."""
    names = {type(x).__name__ for x in (*model.modules(), *model.parameters())}
    if found := sorted(names & {"FullyShardedDataParallel", "DTensor"}):
        raise BinarizeError(
            f"{what}: this process holds only a shard of the parameters ({found[0]}); gather the full state dict on "
            "one process, and load it into a converted model that is not sharded."
        )


def prefixes(name: str) -> list[str]:
    """Return the names of a module's ancestors, outermost first, and its own name last."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def matches(pattern: str, name: str) -> bool:
    """Return True if a glob pattern matches the name of a module or of one of its ancestors; ``*`` matches dots."""
    return any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes(name))


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Replace submodules in place, under all their names; ``new`` maps the ``id`` of an old module to its replacement.

    Returns:
        The name and the old module of each replacement; ``model.set_submodule(name, old)`` undoes it.
    """
    old = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if id(module) in new]
    for name, module in old:
        model.set_submodule(name, new[id(module)])
    return old


def refuse_lazy(model: nn.Module) -> None:
    """Raise BinarizeError if a lazy layer has no weights yet."""
    for name, module in model.named_modules():
        if any(map(is_lazy, [*module.parameters(recurse=False), *module.buffers(recurse=False)])):
            raise BinarizeError(f"{name!r} is a {type(module).__name__} without weights; run one forward first.")


def update_config(model: Any, values: Mapping[str, Any], remove: str | None = None) -> None:
    """Change entries of a diffusers model's configuration, as if its constructor had been given the new values.

    diffusers' ``from_config`` ignores the entries that ``_use_default_values`` lists.
    """
    config = {name: value for name, value in model.config.items() if name != remove} | dict(values)
    if "_use_default_values" in config:
        config["_use_default_values"] = [name for name in config["_use_default_values"] if name not in values]
    model._internal_dict = type(model.config)(config)


def meta_copy(model: ModelT) -> ModelT:
    """Return a copy of a model whose parameters and buffers are on the meta device, where they take no memory."""
    refuse_lazy(model)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def call_arguments(given: Any, caller: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for a forward from a tensor, a tuple of arguments or a dict."""
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, Tensor | list | tuple):
        return (given,) if isinstance(given, Tensor) else tuple(given), {}
    kind = type(given).__name__
    raise BinarizeError(f"{caller}: example_inputs must be a tensor, a tuple of arguments or a dict; got {kind}.")


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that PyTorch allocated itself: a copy of one that lies in a memory-mapped file.

    Tensors of a mapped safetensors file are not aligned to 64 bytes. Vectorised sums then round differently, which can
    flip a sign in the next layer, so that a loaded model would not compute what the saved one did.
    """
    return tensor if tensor.is_meta or tensor.untyped_storage().resizable() else tensor.clone()


def align_tensors(model: ModelT) -> ModelT:
    """Copy the parameters and buffers of a model out of memory-mapped files, see `aligned`; return the model."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        tensor.data = aligned(tensor.data)
    return model


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its submodules back into its previous mode afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
