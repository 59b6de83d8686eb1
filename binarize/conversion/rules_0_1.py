"""The default selection of binarize 0.1, which loading a model that it saved repeats. These rules never change."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from binarize.conversion.selection import Selection, decide
from binarize.hosts import Host
from binarize.methods import Method

_TIME = re.compile(r"(^|\.)(time|timestep|t_emb|emb_|embed|class_emb|label_emb|add_emb|noise|temb)")
_ATTENTION_CLASS = re.compile(r"Attention(Block|Layer)?(\d[dD])?$")
_ATTENTION_PATH = re.compile(r"(^|\.)(self_|cross_)?att(entio)?n(s|\d+)?$")


def selected_by_0_1(model: nn.Module, host: Host, method: Method, selection: Selection) -> set[str]:
    """Return the names of the layers that binarize 0.1 made binary for the same arguments."""
    own = type(host)
    rules = {name: rule for name, rule in _RULES.items() if getattr(own, name) is getattr(Host, name)}
    then = type(own.__name__, (own,), rules)()
    defaults = {**_embeddings(then, model), **then.full_precision(model, method)}
    return {
        names[0]
        for names, layer in _examined(model)
        if _supported(layer) and decide(names, layer, method, selection, defaults, None)[0] is not None
    }


def _examined(model: nn.Module) -> list[tuple[list[str], nn.Module]]:
    layers: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            layers.setdefault(id(module), ([], module))[0].append(name)
    return list(layers.values())


def _heads(host: Host, model: nn.Module) -> dict[str, str]:
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)]
    weighted = [n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]
    return dict.fromkeys([*(convolutions or weighted)[:1], *weighted[-1:]], "first or last layer")


def _embeddings(host: Host, model: nn.Module) -> dict[str, str]:
    linear = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    return {name: "time or class embedding" for name in linear if _TIME.search(name)}


def _attention(host: Host, model: nn.Module) -> dict[str, str]:
    found = [
        name
        for name, module in model.named_modules()
        if _ATTENTION_CLASS.search(type(module).__name__) or _ATTENTION_PATH.search(name)
    ]
    return dict.fromkeys(found, "attention projection")


def _supported(layer: nn.Module) -> bool:
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return any(isinstance(layer, c) and type(layer).forward is c.forward for c in (nn.Conv2d, nn.Linear))


_RULES: Mapping[str, Any] = {"heads": _heads, "attention": _attention, "adapters": lambda host, model: {}}
