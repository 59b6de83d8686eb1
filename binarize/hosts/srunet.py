"""SRUNet as a host."""

import itertools
from typing import Any, cast

import torch
from torch import nn

from binarize.hosts.base import Edit, Host, named_embeddings, register_host
from binarize.methods import Method
from binarize.modules import update_config


@register_host("SRUNet")
class SRUNetHost(Host):
    """binarize.models.SRUNet, whose structure is an option of its configuration."""

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Return True for an SRUNet; the check by name does not import diffusers."""
        return any(c.__module__ == "binarize.models.unet" and c.__name__ == "SRUNet" for c in type(model).__mro__)

    def num_train_timesteps(self, model: nn.Module) -> int | None:
        """Return T from the configuration."""
        return int(_config(model)["num_train_timesteps"])

    def has_structure(self, model: nn.Module) -> bool:
        """Return True if the widths double from level to level, as (cp, cs) needs."""
        mults = _config(model)["channel_mults"]
        return all(fine * 2 == coarse for fine, coarse in itertools.pairwise(mults))

    def notes(self, model: nn.Module, structure: str) -> list[str]:
        """Return the reason if the structure cannot be rewired."""
        if self.has_structure(model) or structure != "keep":
            return []
        return ["the structure was kept: CP-Down and CP-Up need widths that double from level to level"]

    def structure(self, model: nn.Module) -> str:
        """Return the two options that define the structure."""
        return f"({_config(model)['resampling']}, {_config(model)['fusion']})"

    def rewire(self, model: nn.Module) -> list[Edit]:
        """Build the (cp, cs) network and move every layer with the same name and shape into it."""
        config = _config(model)
        if (config["resampling"], config["fusion"]) == ("cp", "cs"):
            return []
        keys = [key for key in config if not key.startswith("_") and key not in ("resampling", "fusion", "conversion")]
        parameter = next(model.parameters())
        with torch.device(parameter.device):
            twin = type(model)(resampling="cp", fusion="cs", **{key: config[key] for key in keys})
        nn.Module.to(twin, dtype=parameter.dtype)  # ModelMixin's own `to` warns of layers kept in float32; none are
        twin.train(model.training)
        old = dict(model.named_modules())
        for path, module in list(twin.named_modules()):
            is_layer = path in old and path and module._parameters and not any(module.children())
            if is_layer and _shapes(old[path]) == _shapes(module):
                twin.set_submodule(path, old[path])
        note = "rebuilt with CP-Down, CP-Up and CS-Fusion"
        return [Edit(child, twin.get_submodule(child), note) for child in ("encoder", "middle", "decoder")]

    def after_rewire(self, model: nn.Module) -> None:
        """Write the new structure into the configuration."""
        update_config(model, {"resampling": "cp", "fusion": "cs"})

    def decoder_levels(self, model: nn.Module) -> list[str]:
        """Return the blocks of each level."""
        return [f"decoder.{level}.blocks" for level in range(len(_config(model)["channel_mults"]))]

    def heads(self, model: nn.Module) -> dict[str, str]:
        """Return the two convolutions by their names."""
        return {"conv_in": "first convolution", "conv_out": "last convolution"}

    def embeddings(self, model: nn.Module) -> dict[str, str]:
        """Return embeddings by their names."""
        return named_embeddings(model)

    def full_precision(self, model: nn.Module, method: Method) -> dict[str, str]:
        """Keep first and last convolution, attention, and by default BI-DiffSR's two finest decoder levels."""
        kept = {**self.heads(model), "time_mlp": "time embedding"}
        attention = [name for name, module in model.named_modules() if type(module).__name__ == "SelfAttention"]
        kept |= dict.fromkeys(attention, "attention projection")
        return kept | self.full_precision_levels(model, method, default=(0, 1))


def _config(model: nn.Module) -> dict[str, Any]:
    return dict(cast(Any, model).config)


def _shapes(module: nn.Module) -> tuple[str, list[tuple[str, tuple[int, ...]]]]:
    return type(module).__name__, [(name, tuple(p.shape)) for name, p in module.named_parameters()]
