"""Hosts: families of networks whose structure is known. Adding one is one class with `register_host`."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from binarize.conditioning import Timestep
from binarize.errors import BinarizeError
from binarize.hosts.roles import Roles, find_roles
from binarize.hosts.timesteps import known_timestep
from binarize.methods import Method
from binarize.modules import prefixes
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
    example_inputs: Any = None  # of the model's forward, as given to `binarize.convert`
    told: Timestep | None = None  # where the timestep is, if `binarize.convert` was told
    original: nn.Module | None = None  # the model that has values, of which the one looked at is a copy without

    @cached_property
    def _roles(self) -> WeakKeyDictionary[nn.Module, Roles]:
        return WeakKeyDictionary()

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Return True if the model belongs to this family."""
        return True

    def num_train_timesteps(self, model: nn.Module) -> int | None:
        """Return T if the model's own configuration has it."""
        return None

    def timestep(self, model: nn.Module) -> Timestep | None:
        """Return where the model's timestep is and what it means, or None if names of arguments tell."""
        return known_timestep(model)

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

    def rewire_contract(self, model: nn.Module) -> list[Edit]:
        """Return the replacements of the contract form, after which every block's output has the shape of before."""
        raise BinarizeError(
            f"{type(model).__name__} has no contract form (taken for: {self.name}); diffusers' U-Nets have one. "
            "Use structure='cp_cs' or 'keep'."
        )

    def edits(self, model: nn.Module, structure: str) -> list[Edit]:
        """Return the replacements of the ``structure`` "cp_cs" or "contract"."""
        return self.rewire_contract(model) if structure == "contract" else self.rewire(model)

    def after_rewire(self, model: nn.Module) -> None:
        """Update the model's configuration after the replacements of `rewire`."""

    def rewired(self, model: nn.Module) -> bool:
        """Return True if the model already has the structure that `rewire` gives; it is then not called."""
        return False

    def rewired_structure(self, model: nn.Module) -> str:
        """Return the ``structure``, "cp_cs" or "contract", that gives a new host the form of a rewired model."""
        return "cp_cs"

    def structure(self, model: nn.Module) -> str:
        """Return a name for the model's structure."""
        return "its own"

    def notes(self, model: nn.Module, structure: str) -> list[str]:
        """Return the report's remarks on a model that will get the ``structure`` "keep", "cp_cs" or "contract"."""
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
        kept = self.full_precision_levels(model, method) | self.heads(model)
        return {**self.attention(model), **self.adapters(model), **kept}

    def roles(self, model: nn.Module) -> Roles:
        """Return the roles of the model's layers, see `binarize.hosts.roles`; found once for each conversion."""
        if model not in self._roles:
            known = tuple(self.adapters(model))
            arguments = (each.argument for each in (self.told, self.timestep(model)) if each is not None)
            name = next((argument for argument in arguments if isinstance(argument, str)), None)
            self._roles[model] = find_roles(model, self.example_inputs, known, self.original, name)
        return self._roles[model]

    def role_notes(self, linear: bool = False) -> list[str]:
        """Return the report's remarks on how the roles were found, those of linear layers if they become binary."""
        notes = []
        if linear and any(roles.by != "forward" for roles in self._roles.values()):
            notes.append(
                "no forward showed which linear layers process the timestep or a condition; their names and widths "
                "decided: pass example_inputs, or name the right ones in keep"
            )
        if any(roles.by == "order" for roles in self._roles.values()):
            notes.append(
                "the first and the last layer are those registered first and last, which need not be the ones that "
                "read the input and give the output: pass example_inputs, or name the right ones in keep"
            )
        if idle := [name for roles in self._roles.values() for name in roles.idle]:
            notes.append(
                f"{len(idle)} convolutions, such as {idle[0]}, took no part in the forward that showed which layers "
                "read the input and give the output: name those of them that do in keep"
            )
        return notes

    def heads(self, model: nn.Module) -> dict[str, str]:
        """Return the layers that read the model's input or give its output, of which there can be several."""
        roles, convolutions = self.roles(model), nn.modules.conv._ConvNd
        linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        has_convolution = any(isinstance(m, convolutions) for m in model.modules())
        last = {n: "last layer" if n in linear else "last convolution" for n in roles.outputs}
        return last | dict.fromkeys(roles.inputs, "first convolution" if has_convolution else "first layer")

    def adapters(self, model: nn.Module) -> dict[str, str]:
        """Return the layers by which adapters (ControlNet) and latent codes are attached to a network."""
        values = dict((self.original if self.original is not None else model).named_modules())
        kept = {}
        for name, module in model.named_modules():
            if match := _ADAPTER_PATH.search(name):
                kept[name] = _ADAPTERS[str(match.lastgroup)]
            elif _is_pointwise(module) and _is_zero(values.get(name, module)):
                kept[name] = "zero-initialized"
        return kept

    def embeddings(self, model: nn.Module) -> dict[str, str]:
        """Return the linear layers that process a timestep, a class or another condition, in every block.

        They are found by a forward (`roles`), by names in use, and by the width of the time embedding, which the
        linear layers of a block with convolutions read.
        """
        roles = self.roles(model)
        named = named_embeddings(model)
        read = () if roles.by == "forward" else _readers_of_the_time(model, named)
        return {**named, **dict.fromkeys([*roles.embeddings, *read], EMBEDDING)}

    def attention(self, model: nn.Module) -> dict[str, str]:
        """Return the projections of attention and of transformers.

        They are all layers below a module that is attention by its class or name, but for feed-forward ones, and
        ``proj_in`` and ``proj_out`` of a transformer.
        """
        within, kept = set[str](), dict[str, str]()
        for name, module in model.named_modules(remove_duplicate=False):
            if _ATTENTION_CLASS.search(type(module).__name__) or _ATTENTION_PATH.search(name):
                within.add(name)
            if name and "Transformer" in type(module).__name__:
                children = (child for child, _ in module.named_children() if child in ("proj_in", "proj_out"))
                kept |= {f"{name}.{child}": "attention projection" for child in children}
            above = next((prefix for prefix in reversed(prefixes(name)) if prefix in within), None)
            if above is None or any(True for _ in module.children()):
                continue
            if not (isinstance(module, nn.Linear) and _FEED_FORWARD.search(name.removeprefix(above))):
                kept[name] = "attention projection"
        return kept


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and set(module.kernel_size) == {1}


def _is_zero(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_meta and not bool(weight.any())


EMBEDDING = "time or class embedding"


def named_embeddings(model: nn.Module) -> dict[str, str]:
    """Return the linear layers that are embeddings of a time or class by their names or the norm that they scale."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        norm = _ADAPTIVE_NORM.search(type(module).__name__) is not None
        for inner, layer in module.named_modules(prefix=name) if norm else [(name, module)]:
            if isinstance(layer, nn.Linear) and (norm or _TIME_PATH.search(inner)):
                found[inner] = EMBEDDING
    return found


def _readers_of_the_time(model: nn.Module, embeddings: Iterable[str]) -> list[str]:
    """Return the linear layers, in blocks with convolutions, that read as many features as the time embedding has."""
    modules = dict(model.named_modules())
    widths = {cast(nn.Linear, modules[name]).out_features for name in embeddings}
    found = []
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or module.in_features not in widths or _INSIDE_TRANSFORMER.search(name):
            continue
        blocks = [modules[prefix] for prefix in prefixes(name)[:-1]]
        if any(isinstance(layer, nn.modules.conv._ConvNd) for block in blocks for layer in block.modules()):
            found.append(name)
    return found


_TIME_PATH = re.compile(
    r"(^|\.)(time|timestep|t_emb|emb_|embed|class_emb|label_emb|add_emb|noise|temb|cond_emb|mapping|map_|Dense_\d|affine"
    r"|adaln|ada_?norm|film)",
    re.IGNORECASE,
)
_ADAPTIVE_NORM = re.compile(r"^Ada(ptive)?\w*(Norm|GN|LN)|FiLM")
_ATTENTION_CLASS = re.compile(r"Attention(Block|Layer)?(\d[dD])?$|^Attn(Block|Layer)?(pp)?$")
_ATTENTION_PATH = re.compile(r"(^|\.)(self_|cross_|temp_)?att(entio)?n(s|_?\d+)?$")
_FEED_FORWARD = re.compile(r"(^|\.)(ff|ffn|ff_in|feed_?forward|mlp)(\.|$)")
_INSIDE_TRANSFORMER = re.compile(r"(^|\.)(\w*att(entio)?ns?\w*|transformer\w*|ff|ffn|ff_in|feed_?forward)(\.|$)")
_ADAPTERS = {
    "condition": "conditioning input of a ControlNet",
    "zero": "zero convolution of a ControlNet",
    "latent": "convolution of a latent code",
}
_ADAPTER_PATH = re.compile(
    r"(^|\.)(?:(?P<condition>controlnet_cond_embedding|input_hint_block)"
    r"|(?P<zero>controlnet_(down_blocks|mid_block)|zero_convs|middle_block_out)"
    r"|(?P<latent>(post_)?quant_conv|(encoder|decoder)\.conv_(in|out)))$"
)

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
