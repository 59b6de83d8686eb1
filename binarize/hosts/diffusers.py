"""diffusers' UNet2DModel and UNet2DConditionModel as hosts; importing this module does not import diffusers."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

from torch import nn

from binarize.conditioning import BY_STEPS, Timestep
from binarize.errors import BinarizeError
from binarize.hosts.base import Edit, Host, named_embeddings, register_host
from binarize.methods import Method

# Blocks whose skips are the outputs of their resnet blocks and of their downsampler, each concatenated separately.
_BLOCKS = {
    *("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    *("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    *("SimpleCrossAttnDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"),
    *("SimpleCrossAttnUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D"),
}


class DiffusersUNetHost(Host):
    """Base class of UNet2DModel and UNet2DConditionModel as hosts.

    The structure pass gives one of two forms. If each level is twice as wide as the one before and every level is
    resampled by one convolution, it is the *published* form: CP-Down doubles the width, CP-Up halves it, and skips have
    the decoder's width. Otherwise it is the *contract* form: CP-Down and CP-Up keep the width, so that every block's
    output keeps its shape, and fusions have the widths of their inputs. It can also be asked for.
    """

    fourier: Timestep  # what a Fourier embedding takes

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Return True for diffusers' class of that name, and for classes derived from it."""
        return any(c.__name__ == cls.name and c.__module__.startswith("diffusers.") for c in type(model).__mro__)

    def num_train_timesteps(self, model: nn.Module) -> int | None:
        """Return T if the configuration has it, which is the case for learned time embeddings."""
        steps = cast(Any, model).config.get("num_train_timesteps")
        return None if steps is None else int(steps)

    def timestep(self, model: nn.Module) -> Timestep | None:
        """Return the noise level that a Fourier embedding takes; other embeddings take steps."""
        fourier = cast(Any, model).config.get("time_embedding_type") == "fourier"
        return self.fourier if fourier else BY_STEPS

    def has_structure(self, model: nn.Module) -> bool:
        """Return True if a block can be rewired."""
        return any(True for _ in _fusions(model)) or bool(_resamplers(model)[0])

    def rewired(self, model: nn.Module) -> bool:
        """Return True if the structure pass has rewired the model."""
        return any(type(module).__module__ == "binarize.hosts.diffusers_blocks" for module in model.modules())

    def structure(self, model: nn.Module) -> str:
        """Return "(cp, cs)" for a rewired model."""
        return "(cp, cs)" if self.rewired(model) else "its own"

    def notes(self, model: nn.Module, structure: str) -> list[str]:
        """Return remarks on the form that the structure pass gives the model, and on blocks that it does not change."""
        notes: list[str] = []
        if structure == "keep" or self.rewired(model):
            return notes
        notes.append(
            "published form: widths double, so CP-Down doubles and CP-Up halves them. Blocks change the shape of their "
            "output, so ControlNet and adapters of the host no longer fit; structure='contract' keeps the shapes"
            if structure == "cp_cs" and _doubles(model)
            else "contract form: CP-Down and CP-Up keep the width, every block's output keeps its shape"
        )
        notes += [f"{path} keeps its structure: {reason}" for path, reason in _resamplers(model)[1].items()]
        if _skips(model) is None:
            notes.append("no fusion was put in: the blocks do not pass their skips as diffusers' plain ones do")
        return notes

    def rewire(self, model: nn.Module) -> list[Edit]:
        """Return the replacements by CP-Down, CP-Up and CS-Fusion, in the published form if it fits."""
        return self._form(model, published=_doubles(model))

    def rewire_contract(self, model: nn.Module) -> list[Edit]:
        """Return the replacements of the contract form."""
        return self._form(model, published=False)

    def rewired_structure(self, model: nn.Module) -> str:
        """Return the form of a rewired model, which its resamplers show."""
        resamplers = [m for m in model.modules() if type(m).__name__ in ("CPDownsample2D", "CPUpsample2D")]
        published = any(len(cast(nn.ModuleList, module.convs)) == 2 for module in resamplers)
        return "cp_cs" if published else "contract"

    def _form(self, model: nn.Module, published: bool) -> list[Edit]:
        if not self.has_structure(model):
            kinds = sorted({type(block).__name__ for block in _blocks(model)})
            raise BinarizeError(
                f"{type(model).__name__} has no block that takes CP-Down, CP-Up or CS-Fusion; its blocks are "
                f"{', '.join(kinds)}. Use structure='keep'."
            )
        return list(_edits(model, published))

    def decoder_levels(self, model: nn.Module) -> list[str]:
        """Return the resnet blocks of each up block, the finest first."""
        return [f"up_blocks.{i}.resnets" for i in reversed(range(len(cast(Any, model).config["block_out_channels"])))]

    def heads(self, model: nn.Module) -> dict[str, str]:
        """Return the two convolutions by their names."""
        return {"conv_in": "first convolution", "conv_out": "last convolution"}

    def embeddings(self, model: nn.Module) -> dict[str, str]:
        """Return embeddings by their names."""
        return named_embeddings(model)

    def full_precision(self, model: nn.Module, method: Method) -> dict[str, str]:
        """Keep first and last convolution, embeddings of time and class, and attention, but not feed-forward layers."""
        kept = self.heads(model)
        embeddings = ("time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj")
        for name, module in model.named_modules():
            kind = type(module).__name__
            if name in embeddings or name.endswith("time_emb_proj") or kind == "AdaGroupNorm":
                kept[name] = "embedding of time or condition"
            elif kind in ("Attention", "MultiheadAttention"):
                kept[name] = "attention projection"
            elif kind in ("Transformer2DModel", "DualTransformer2DModel"):
                kept[f"{name}.proj_in"] = kept[f"{name}.proj_out"] = "attention projection"
        return kept | self.full_precision_levels(model, method)


@register_host("UNet2DModel")
class UNet2DModelHost(DiffusersUNetHost):
    """diffusers' unconditional U-Net (DDPM, DDIM, ADM-like configurations)."""

    fourier = Timestep("timestep", "sigma", (0.01, 1348.0))  # of ScoreSdeVeScheduler


@register_host("UNet2DConditionModel")
class UNet2DConditionModelHost(DiffusersUNetHost):
    """diffusers' U-Net with cross-attention (Stable Diffusion)."""

    # Of the latent upscaler, which passes ln(sigma) / 4 with Stable Diffusion's sigmas.
    fourier = Timestep("timestep", "log_sigma", (math.log(0.0292) / 4, math.log(14.615) / 4))


def _blocks(model: Any) -> list[Any]:
    return [*model.down_blocks, *model.up_blocks]


def _resamplers(model: Any) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the resamplers that can be replaced, and for those that cannot, the reason."""
    found: dict[str, nn.Module] = {}
    obstacles: dict[str, str] = {}
    for side, kind in (("down", "Downsample2D"), ("up", "Upsample2D")):
        for i, block in enumerate(getattr(model, f"{side}_blocks")):
            for j, module in enumerate(getattr(block, f"{side}samplers", None) or ()):
                path = f"{side}_blocks.{i}.{side}samplers.{j}"
                if (reason := _obstacle(module, kind)) is None:
                    found[path] = module
                else:
                    obstacles[path] = reason
    return found, obstacles


def _obstacle(module: Any, kind: str) -> str | None:
    if type(module).__name__ != kind:
        return f"{type(module).__name__} resamples without a convolution of its own"
    conv = module.conv if hasattr(module, "conv") else module.Conv2d_0
    if type(conv) is not nn.Conv2d or module.norm is not None or conv.kernel_size != (3, 3):
        return f"{kind} with options that CP blocks do not have"
    if kind == "Upsample2D" and not module.interpolate:
        return f"{kind} that does not resample"
    if module.channels != module.out_channels or module.channels % 4:
        return f"{module.channels} to {module.out_channels} channels; CP blocks need the same multiple of 4"
    return None


def _is_resnet(module: nn.Module) -> bool:
    return type(module).__name__ == "ResnetBlock2D" and type(module).__module__.startswith("diffusers.")


def _skips(model: Any) -> list[int] | None:
    """Return the widths of the skips in the encoder's order, or None if a block has other skips."""
    if any(type(block).__name__ not in _BLOCKS for block in _blocks(model)):
        return None
    if not all(_is_resnet(resnet) for block in _blocks(model) for resnet in block.resnets):
        return None
    widths = [model.conv_in.out_channels]
    for block in model.down_blocks:
        widths += [resnet.out_channels for resnet in block.resnets]
        if block.downsamplers is not None:
            widths.append(widths[-1])
    return widths


def _fusions(model: Any) -> Iterator[tuple[str, Any, int]]:
    """Yield path, module and skip width of every resnet block that takes a concatenation."""
    skips = _skips(model)
    if skips is None:
        return
    for i, block in enumerate(model.up_blocks):
        for j, resnet in enumerate(block.resnets):
            yield f"up_blocks.{i}.resnets.{j}", resnet, skips.pop()


def _doubles(model: Any) -> bool:
    """Return True if the published form fits: widths double, and one convolution resamples between two levels."""
    if _skips(model) is None or _resamplers(model)[1]:
        return False
    down, up = model.down_blocks, model.up_blocks
    widths = [block.resnets[0].out_channels for block in down]
    ways = len(widths) - 1
    doubling = ways > 0 and all(b == 2 * a for a, b in pairwise(widths))
    constant = all(len({r.out_channels for r in block.resnets}) == 1 for block in _blocks(model))
    mirrored = [block.resnets[0].out_channels for block in up] == widths[::-1]
    once = [len(b.downsamplers or ()) for b in down] == [len(b.upsamplers or ()) for b in up] == [1] * ways + [0]
    return doubling and constant and mirrored and once and model.conv_in.out_channels == widths[0]


def _edits(model: Any, published: bool) -> Iterator[Edit]:
    from binarize.hosts.diffusers_blocks import constant_width, cp_resampler

    parts = 2 if published else 4
    form = f"{'published' if published else 'contract'} form"
    for path, module in _resamplers(model)[0].items():
        yield Edit(path, cp_resampler(module, parts), f"replaces {type(module).__name__}, {form}")
    for i, block in enumerate(model.down_blocks if published else ()):
        if i:
            yield Edit(f"down_blocks.{i}.resnets.0", constant_width(block.resnets[0]), form)
    for path, resnet, skip in _fusions(model):
        width = resnet.out_channels
        widths = (width, width) if published else (resnet.in_channels - skip, skip)
        yield Edit(path, constant_width(resnet, widths), form)
