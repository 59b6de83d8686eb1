"""Hosts: families of networks whose structure is known. Adding one is one class with `register_host`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from binarize.errors import BinarizeError
from binarize.methods import Method
from binarize.registry import Registry


@dataclass(frozen=True)
class Edit:
    """One replacement that rewires a host: the path of the replaced module, the new one, and the report's remark."""

    path: str
    module: nn.Module
    note: str


class Host:
    """A family of networks. The base class serves any nn.Module; each method has a default that fits all networks."""

    name = "any module"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Return True if the model belongs to this family."""
        return True

    def num_train_timesteps(self, model: nn.Module) -> int | None:
        """Return T if the model's own configuration has it."""
        return None

    def has_structure(self, model: nn.Module) -> bool:
        """Return True if `rewire` can give the model CP-Down, CP-Up and CS-Fusion."""
        return False

    def rewire(self, model: nn.Module) -> list[Edit]:
        """Return the replacements that give the model CP-Down, CP-Up and CS-Fusion, without changing the model.

        Convolutions that keep their shape stay the same module objects and so keep their weights.
        """
        raise BinarizeError(
            f"{type(model).__name__} has no structure that the toolkit can rewire (taken for: {self.name}); "
            "use structure='keep', or register a host with @binarize.register_host."
        )

    def after_rewire(self, model: nn.Module) -> None:
        """Update the model's configuration after the replacements of `rewire`."""

    def rewired(self, model: nn.Module) -> bool:
        """Return True if the model already has the structure that `rewire` gives; it is then not called."""
        return False

    def structure(self, model: nn.Module) -> str:
        """Return a name for the model's structure."""
        return "its own"

    def notes(self, model: nn.Module, structure: str) -> list[str]:
        """Return the report's remarks on a model that the conversion will give the ``structure`` "keep" or "cp_cs"."""
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
        """Return the decoder levels that ``method.fp_decoder_levels`` keeps, in the form of `full_precision`.

        ``default`` are the levels to keep if the method does not set them; those that the model lacks are ignored.
        """
        levels, chosen = self.decoder_levels(model), method.fp_decoder_levels
        if chosen is None:
            chosen = tuple(level for level in default if level < len(levels))
        if any(level >= len(levels) for level in chosen):
            known = f"levels 0 (the finest) to {len(levels) - 1}" if levels else "no known decoder levels"
            raise BinarizeError(
                f"{method.name}: fp_decoder_levels={chosen!r}, but {type(model).__name__} has {known}; "
                "use keep=[...] patterns for other parts."
            )
        return {levels[level]: f"decoder level {level} (fp_decoder_levels)" for level in chosen}

    def full_precision(self, model: nn.Module, method: Method) -> dict[str, str]:
        """Return the modules that stay full precision by default, with everything below them, and the reasons."""
        kept = self.full_precision_levels(model, method)
        convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)]
        weighted = [name for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]
        if weighted:
            kept[(convolutions or weighted)[0]] = "first convolution" if convolutions else "first layer"
            kept.setdefault(weighted[-1], "last convolution" if weighted[-1] in convolutions else "last layer")
        for name, module in model.named_modules():
            if _ATTENTION_CLASS.search(type(module).__name__) or _ATTENTION_PATH.search(name):
                kept.setdefault(name, "attention projection")
        return kept


_ATTENTION_CLASS = re.compile(r"Attention(Block|Layer)?(\d[dD])?$")
_ATTENTION_PATH = re.compile(r"(^|\.)(self_|cross_)?att(entio)?n(s|\d+)?$")

HOSTS: Registry[type[Host]] = Registry("host")
H = TypeVar("H", bound=type[Host])


def register_host(name: str, *, replace: bool = False) -> Callable[[H], H]:
    """Return a class decorator that registers a `Host` subclass under a name. Hosts registered later are tried first.

    ``replace`` allows the name to be registered already.
    """

    def add(cls: H) -> H:
        if not (isinstance(cls, type) and issubclass(cls, Host)):
            raise BinarizeError(f"host {name!r} must be a class derived from binarize.hosts.Host; got {cls!r}.")
        HOSTS.register(name, replace=replace)(cls)
        cls.name = name
        return cls

    return add


def list_hosts() -> list[str]:
    """Return the names of all registered hosts, sorted."""
    return list(HOSTS)


def find_host(model: nn.Module) -> Host:
    """Return the host of a model: of those that match, the one registered last, else the generic one."""
    return next((cls for cls in HOSTS.newest_first() if cls.matches(model)), Host)()
