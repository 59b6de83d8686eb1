"""What a host is: a family of networks whose structure the toolkit knows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from binarize.errors import BinarizeError
from binarize.methods import BiDiffSR, Method
from binarize.registry import Registry


@dataclass(frozen=True)
class Edit:
    """One replacement that rewires a host: ``parent.attribute`` becomes ``module``.

    Attributes:
        path: Full name of the replaced module.
        module: What takes its place.
        note: What the report says.
    """

    path: str
    module: nn.Module
    note: str


class Host:
    """Knows one family of networks. The base class serves any nn.Module.

    Subclass it and register the subclass with `register_host` to teach the toolkit another family.
    """

    name = "any module"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Say whether the model belongs to this family."""
        return True

    def num_train_timesteps(self, model: nn.Module) -> int | None:
        """Return T if the model's own configuration has it."""
        return None

    def has_structure(self, model: nn.Module) -> bool:
        """Say whether the structure pass can rewire the model to CP-Down, CP-Up and CS-Fusion."""
        return False

    def rewire(self, model: nn.Module) -> list[Edit]:
        """Return the replacements that give the model CP-Down, CP-Up and CS-Fusion; the model is not touched.

        Convolutions that are carried over are the same modules, so that their weights are kept.
        """
        raise BinarizeError(
            f"{type(model).__name__} has no structure that the toolkit can rewire (taken for: {self.name}); "
            "use structure='keep', or register a host with @binarize.register_host."
        )

    def after_rewire(self, model: nn.Module) -> None:
        """Update the model's own record of its structure, once the replacements are in place."""

    def rewired(self, model: nn.Module) -> bool:
        """Say whether the model already has the structure that `rewire` gives; it is then left out."""
        return False

    def structure(self, model: nn.Module) -> str:
        """Name the structure that the model has."""
        return "its own"

    def notes(self, model: nn.Module, structure: str) -> list[str]:
        """Return what the report says of the model as a whole; asked before anything is changed.

        Args:
            model: The model.
            structure: "keep" or "cp_cs", what the conversion is about to do.
        """
        rectifiers = sum(isinstance(module, nn.ReLU) for module in model.modules())
        if not rectifiers:
            return []
        return [
            f"the host has {rectifiers} nn.ReLU; where one feeds a binary layer every sign is +1. Methods that learn a "
            "shift ('reactnet', 'bbcu', 'bidiffsr') get past that, and so does 'dorefa' with its codes in {0, 1}"
        ]

    def decoder_levels(self, model: nn.Module) -> list[str]:
        """Return the module that holds the ResBlocks (and fusions) of each decoder level, the finest first."""
        return []

    def full_precision_levels(self, model: nn.Module, method: Method, default: tuple[int, ...] = ()) -> dict[str, str]:
        """Return the decoder levels that ``bidiffsr(fp_decoder_levels=...)`` keeps, as `full_precision` does.

        Args:
            model: The model.
            method: The method.
            default: Levels kept where the option is not given; those that the model does not have are left out.

        Raises:
            BinarizeError: If the option names a level that the model does not have.
        """
        if not isinstance(method, BiDiffSR):
            return {}
        levels, chosen = self.decoder_levels(model), method.fp_decoder_levels
        if chosen is None:
            chosen = tuple(level for level in default if level < len(levels))
        if any(level >= len(levels) for level in chosen):
            have = (
                f"levels 0 (the finest) to {len(levels) - 1}" if levels else "no decoder levels that the toolkit knows"
            )
            raise BinarizeError(
                f"{method.name}: fp_decoder_levels={chosen!r}, but {type(model).__name__} has {have}; "
                "use keep=[...] patterns for other parts."
            )
        return {levels[level]: f"decoder level {level} (fp_decoder_levels)" for level in chosen}

    def full_precision(self, model: nn.Module, method: Method) -> dict[str, str]:
        """Return the modules that stay full precision by default, as name (or name of an ancestor) to reason."""
        kept = self.full_precision_levels(model, method)
        convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)]
        weighted = [name for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]
        if convolutions:
            kept[convolutions[0]] = "first convolution"
        elif weighted:
            kept[weighted[0]] = "first layer"
        if weighted:
            last = weighted[-1]
            kept.setdefault(last, "last convolution" if last in convolutions else "last layer")
        for name, module in model.named_modules():
            if _ATTENTION_CLASS.search(type(module).__name__) or _ATTENTION_PATH.search(name):
                kept.setdefault(name, "attention projection")
        return kept


_ATTENTION_CLASS = re.compile(r"Attention(Block|Layer)?(\d[dD])?$")
_ATTENTION_PATH = re.compile(r"(^|\.)(self_|cross_)?att(entio)?n(s|\d+)?$")
TIME_PATH = re.compile(r"(^|\.)(time|timestep|t_emb|emb_|embed|class_emb|label_emb|add_emb|noise|temb)")

HOSTS: Registry[type[Host]] = Registry("host")
H = TypeVar("H", bound=type[Host])


def find_host(model: nn.Module) -> Host:
    """Return the host adapter for a model: the one registered last that matches, else the generic one."""
    for name in reversed(list(HOSTS._items)):
        if HOSTS[name].matches(model):
            return HOSTS[name]()
    return Host()
