"""Registers binarize with diffusers as one of its quantization methods.

``save_pretrained`` of a converted or packed diffusers model writes the record of the conversion into config.json, as
its ``quantization_config``. ``from_pretrained`` of the model or of a pipeline finds the method's quantizer by the name
in it, which converts the empty network before the weights are loaded.

`register` runs once diffusers has been imported, see ``binarize/__init__.py``.
"""

import functools
import inspect
from collections.abc import Callable
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from binarize.conversion.apply import apply_conversion, check_saveable
from binarize.conversion.convert import convert, revert
from binarize.conversion.packing import is_packed
from binarize.conversion.record import QUANT_METHOD, QUANTIZATION, conversion, is_converted, recorded_conversion
from binarize.digests import meanwhile
from binarize.errors import BinarizeError
from binarize.files import update_folder
from binarize.modules import align_tensors, aligned
from binarize.packed.files import check_folder, seal_folder
from binarize.packed.int8 import INTEGERS, STEP, has_int8_weights, restore_weights, writing
from binarize.packed.layers import PackedConv2d, PackedLinear, freeze


class _QuantMethod(str, Enum):
    BINARIZE = QUANT_METHOD  # diffusers reads its `value`


class BinarizeConfig(QuantizationConfigMixin):
    """The ``quantization_config`` with which ``from_pretrained`` of diffusers converts the network that it loads.

    The pretrained weights become the latent weights, and scales are computed from them, as if `binarize.convert` were
    called on the loaded model.

    Args:
        method: As in `binarize.convert`.
        options: The other arguments of `binarize.convert`, such as ``keep`` and ``overrides``.

    Raises:
        BinarizeError: If an option is not an argument of `binarize.convert`.

    Example::

        UNet2DModel.from_pretrained(folder, quantization_config=binarize.BinarizeConfig("reactnet"))
    """

    conversion: dict[str, Any] | None = None

    def __init__(self, method: Any, **options: Any) -> None:
        known = list(inspect.signature(convert).parameters)[2:]
        if unknown := sorted(set(options) - set(known)):
            raise BinarizeError(f"BinarizeConfig: unknown option {unknown[0]!r}; options: {', '.join(known)}.")
        self.quant_method = cast(Any, _QuantMethod.BINARIZE)
        self.method, self.options = method, options

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> "BinarizeConfig":
        """Return the configuration that an entry of config.json describes."""
        recorded = config_dict.get("conversion")
        if not isinstance(recorded, dict):
            raise BinarizeError(f"config.json: its {QUANTIZATION} has no conversion; got {recorded!r}.")
        config = cls(recorded.get("method"))
        config.conversion = recorded
        return config

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"BinarizeConfig({self.method!r}{options})"

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of config.json, or before the conversion a description."""
        given = {"method": str(self.method)} if self.conversion is None else {"conversion": self.conversion}
        return {"quant_method": QUANT_METHOD, **given}


class BinarizeQuantizer(DiffusersQuantizer):
    """Converts a model while diffusers loads it; diffusers calls the methods in this order."""

    quantization_config: BinarizeConfig
    pre_quantized: bool
    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = True
    is_compileable = True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to keep weights on disk, and to convert a model that is spread over devices."""
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if "disk" in places or (len(places) > 1 and not self.pre_quantized):
            raise BinarizeError(
                f"from_pretrained: the device map places the model on {', '.join(sorted(map(str, places)))}; load it "
                "on one device, such as device_map='cuda', convert and save it, and distribute the saved one."
            )

    def preprocess_model(self, model: Any, **kwargs: Any) -> None:
        """Convert the empty network. Its flag `is_quantized`, by which diffusers refuses other dtypes, is not set."""
        self._process_model_before_weight_loading(model)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            with torch.device("meta"):
                apply_conversion(model, self.quantization_config.conversion or {})

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse weights that do not belong to the conversion; diffusers would leave the others empty."""
        if missing_keys and self.pre_quantized:
            raise BinarizeError(
                f"from_pretrained: weights and config.json do not belong together: {len(missing_keys)} missing "
                f"tensors, such as {min(missing_keys)}."
            )
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        """Return True for the bits of a packed layer, and for weights in 8 bits and their steps."""
        path, _, name = param_name.rpartition(".")
        if name in (INTEGERS, STEP):
            return has_int8_weights(model.get_submodule(path))
        return name == "bits" and isinstance(model.get_submodule(path), PackedConv2d | PackedLinear)

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Load the bits of a packed layer, or the weights of a layer once their integers and steps are there."""
        path, _, name = param_name.rpartition(".")
        layer = model.get_submodule(path)
        if name in (INTEGERS, STEP):
            layer._buffers[name] = aligned(param_value.to(target_device))
            restore_weights(layer)
        else:
            cast(PackedConv2d, layer).load_bits(param_value.to(target_device))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        align_tensors(model)
        if not self.pre_quantized:
            convert(model, self.quantization_config.method, **self.quantization_config.options)
            recorded = recorded_conversion(conversion(model))
            self.quantization_config = BinarizeConfig.from_dict({"conversion": recorded})
        elif is_packed(model):
            freeze(model)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        return revert(model)


def register() -> None:
    """Register the quantizer, and wrap the methods of diffusers that have no place for one."""
    if QUANT_METHOD in AUTO_QUANTIZER_MAPPING:
        return
    ConfigMixin.from_config = classmethod(_converts(ConfigMixin.from_config.__func__))
    ModelMixin.save_pretrained = _saves_whole(ModelMixin.save_pretrained)
    ModelMixin.from_pretrained = classmethod(_compares_digests(ModelMixin.from_pretrained.__func__))
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = BinarizeConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = BinarizeQuantizer  # last: it shows that all of this fits diffusers


def _converts(from_config: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``from_config``: the configuration of a converted model builds a converted one."""

    @functools.wraps(from_config)
    def wrapper(cls: type, *args: Any, **kwargs: Any) -> Any:
        built = from_config(cls, *args, **kwargs)
        model = built[0] if isinstance(built, tuple) else built
        found = getattr(model, "config", {}).get(QUANTIZATION)
        # from_pretrained passes a BinarizeConfig in place of the dict, and converts by itself.
        if isinstance(model, nn.Module) and isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD:
            apply_conversion(model, found["conversion"])
        return built

    return wrapper


def _saves_whole(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``save_pretrained``: what could not be loaded is refused before anything is written.

    A converted model, and one of this package, replaces an earlier one in one step, and its weights get digests.
    """
    signature = inspect.signature(save_pretrained)

    @functools.wraps(save_pretrained)
    def wrapper(self: nn.Module, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> Any:
        check_saveable(self)
        target = Path(save_directory)
        if not (_is_own(type(self)) or is_converted(self)):
            return save_pretrained(self, save_directory, *args, **kwargs)
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        if given.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.name)

        def write(folder: Path) -> None:
            with writing():
                save_pretrained(self, folder, *args, **kwargs)
            seal_folder(folder, given.get("variant"))

        return update_folder(target, write)

    return wrapper


def _compares_digests(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``from_pretrained``: weights on this machine are compared with their digests, if they have one."""

    @functools.wraps(from_pretrained)
    def wrapper(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(pretrained_model_name_or_path, str | PathLike):
            return from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        with meanwhile(lambda: check_folder(folder, kwargs.get("variant"), own=_is_own(cls))):
            return from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs)

    return wrapper


def _is_own(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "binarize"


register()
