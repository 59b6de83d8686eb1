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
from binarize.conversion.record import QUANT_METHOD, QUANTIZATION, conversion, recorded_conversion
from binarize.errors import BinarizeError
from binarize.modules import align_tensors
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
        """Return True for the bits of a packed layer, which are neither a parameter nor a buffer."""
        path, _, name = param_name.rpartition(".")
        return name == "bits" and isinstance(model.get_submodule(path), PackedConv2d | PackedLinear)

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Load the bits of a packed layer."""
        layer = model.get_submodule(param_name.rpartition(".")[0])
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
    """Register the quantizer, and wrap the two methods of diffusers that have no place for one."""
    if QUANT_METHOD in AUTO_QUANTIZER_MAPPING:
        return
    ConfigMixin.from_config = classmethod(_converts(ConfigMixin.from_config.__func__))
    ModelMixin.save_pretrained = _checks(ModelMixin.save_pretrained)
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


def _checks(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``save_pretrained``: what could not be loaded is refused before anything is written."""

    @functools.wraps(save_pretrained)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        check_saveable(self)
        return save_pretrained(self, *args, **kwargs)

    return wrapper


register()
