"""Load the checkpoints that the authors of BI-DiffSR released."""

import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from binarize.conversion.convert import convert
from binarize.digests import load_torch_file
from binarize.errors import BinarizeError, clip
from binarize.methods import BiDiffSR
from binarize.models.unet import SRUNet

OFFICIAL_CONFIG: dict[str, Any] = {
    "in_channel": 6,
    "out_channel": 3,
    "inner_channel": 64,
    "norm_groups": 16,
    "channel_mults": [1, 2, 4, 8],
    "attn_res": [],
    "res_blocks": 2,
    "dropout": 0.2,
    "image_size": 256,
    "fp_res": [256, 128],
    "total_step": 2000,
    "dynamic_group": 5,
}
"""The released x2 and x4 configuration, in the released code's names."""


def load_official(path: str | PathLike[str], *, sign_zero: str = "zero", **official_config_names: Any) -> SRUNet:
    """Read a released BI-DiffSR checkpoint into a converted SRUNet in eval mode and the file's dtype.

    Args:
        path: A torch file ``{"params": state_dict}``, read with ``weights_only=True``: it runs no code from the file.
        sign_zero: Value of sign(0): "zero", as in the released training code, or "plus".
        **official_config_names: Differences from the released configuration, in the names of `OFFICIAL_CONFIG`.

    Raises:
        BinarizeError: If the file cannot be read, a name is unknown, or keys or shapes do not fit.
    """
    from binarize.models.official_config import check_names

    check_names(official_config_names)
    config = _checked({**OFFICIAL_CONFIG, **official_config_names})
    state = _read(path)
    with torch.device("meta"):  # a file that does not fit costs no memory
        twin = official_network(config, sign_zero=sign_zero)
    mapped, unexpected = _map_keys(state, twin, config["dynamic_group"])
    expected = twin.state_dict()
    missing = sorted(set(expected) - set(mapped))
    wrong = [
        f"{key} is {value.dtype} {tuple(value.shape)}, expected {tuple(expected[key].shape)}"
        for key, value in mapped.items()
        if key in expected and (value.shape != expected[key].shape or not value.is_floating_point())
    ]
    unexpected += sorted(set(mapped) - set(expected))
    if missing or unexpected or wrong:
        raise BinarizeError(_mismatch(path, missing, unexpected, wrong))
    model = official_network(config, sign_zero=sign_zero)
    model.to(next(iter(mapped.values())).dtype).load_state_dict(mapped)
    return model.eval()


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    from binarize.models.official_config import OfficialConfig, ValidationError

    config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    try:
        OfficialConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        given = clip(repr(first["input"]), 80)
        raise BinarizeError(f"load_official: {first['loc'][0]} has {given}: {first['msg'].lower()}.") from None
    return config


def official_network(config: dict[str, Any], *, sign_zero: str = "zero") -> SRUNet:
    """Return the untrained, converted network of a configuration in the released code's names."""
    size = config["image_size"]
    allowed = [size // 2**level for level in range(len(config["channel_mults"]))]

    def levels(key: str) -> tuple[int, ...]:
        for resolution in config[key]:
            if resolution not in allowed:
                raise BinarizeError(f"load_official: {key} holds {resolution}; with image_size {size}, use {allowed}.")
        return tuple(sorted(map(allowed.index, config[key])))

    model = SRUNet(
        in_channels=config["in_channel"],
        out_channels=config["out_channel"],
        base_channels=config["inner_channel"],
        channel_mults=tuple(config["channel_mults"]),
        res_blocks=config["res_blocks"],
        norm_groups=config["norm_groups"],
        dropout=config["dropout"],
        attention_levels=levels("attn_res"),
        num_train_timesteps=config["total_step"],
    )
    method = BiDiffSR(
        groups=config["dynamic_group"],
        fp_decoder_levels=levels("fp_res"),
        sign_zero=sign_zero,  # type: ignore[arg-type]
    )
    return convert(model, method)


def _read(path: str | PathLike[str]) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise BinarizeError(f"load_official: {path} is not a file.")
    try:
        loaded = load_torch_file(Path(path))
    except BinarizeError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise BinarizeError(f"load_official: {path} is not a readable torch checkpoint ({kind}).") from error
    state = loaded.get("params") if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(map(_is_weight, state.items())) or not state:
        keys = (
            ", ".join(f"{key!s:.40}" for key in list(loaded)[:5]) if isinstance(loaded, dict) else type(loaded).__name__
        )
        raise BinarizeError(f"load_official: {path} must hold {{'params': state_dict}}; it holds {keys}.")
    for name, value in state.items():  # a tensor of a few bytes can claim any size, with strides of 0
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise BinarizeError(f"load_official: {path}: {name!r:.80} is larger than its data in the file.")
    return state


def _is_weight(entry: tuple[object, object]) -> bool:
    name, value = entry
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided


def _mismatch(path: str | PathLike[str], missing: list[str], unexpected: list[str], wrong: list[str]) -> str:
    parts = [f"load_official: {path} does not fit the configuration."]
    for label, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)):
        if keys:
            names = ", ".join(clip(key, 60) for key in keys[:3]) + (", ..." if len(keys) > 3 else "")
            parts.append(f"{len(keys)} {label}: {names}.")
    parts.append("Pass the configuration the checkpoint was trained with (inner_channel, channel_mults, fp_res, ...).")
    return " ".join(parts)


def _prefixes(model: SRUNet) -> dict[str, str]:
    """Return the official path of each module, whose lists are flat, to the path in SRUNet."""
    paths = {"timestep_level_mlp.1": "time_mlp.0", "timestep_level_mlp.3": "time_mlp.2"}
    paths |= {"final_conv.block.0": "norm_out", "final_conv.block.3": "conv_out"}
    downs, ups = ["conv_in"], list[str]()
    for level, encoder in enumerate(model.encoder):
        downs += [f"encoder.{level}.blocks.{number}" for number in range(len(encoder.blocks))]  # type: ignore[arg-type]
        downs += [f"encoder.{level}.down"] if encoder.down is not None else []
    for level, decoder in reversed(list(enumerate(model.decoder))):
        for number in range(len(decoder.blocks)):  # type: ignore[arg-type]
            ups += [f"decoder.{level}.blocks.{number}.fusion", f"decoder.{level}.blocks.{number}"]
        ups += [f"decoder.{level}.up"] if decoder.up is not None else []
    middle = [f"middle.{number}" for number in range(len(model.middle))]
    for name, ours in (("downs", downs), ("mid", middle), ("ups", ups)):
        paths.update({f"{name}.{index}": path for index, path in enumerate(ours)})
    return paths


_INSIDE = (
    (r"^res_block\.timestep_func\.1\.", "time."),
    (r"^res_block\.block([12])\.block\.0\.", r"norm\1."),
    (r"^res_block\.block([12])\.conv\.", r"conv\1."),
    (r"^attn\.", "attention."),
    (r"^biconv_?1\.", "convs.0."),
    (r"^biconv_?2\.", "convs.1."),
)
_BINARY = (
    (r"binary_conv\.weight$", "weight"),
    (r"TaR\.dynamic_move_(\d+)\.bias$", r"pre.bias@\1"),
    (r"TaA\.dynamic_relu_(\d+)\.pr_bias0\.bias$", r"post.shift_in@\1"),
    (r"TaA\.dynamic_relu_(\d+)\.pr_prelu\.weight$", r"post.slope@\1"),
    (r"TaA\.dynamic_relu_(\d+)\.pr_bias1\.bias$", r"post.shift_out@\1"),
)


def _map_keys(state: dict[str, Tensor], model: SRUNet, groups: int) -> tuple[dict[str, Tensor], list[str]]:
    """Return SRUNet's state dict, with timestep groups stacked, and the official keys that it has no place for."""
    prefixes = sorted(_prefixes(model).items(), key=lambda item: -len(item[0]))
    plain: dict[str, Tensor] = {}
    stacked: dict[str, dict[int, Tensor]] = {}
    unexpected = []
    for key, value in state.items():
        name = official_to_ours(key, prefixes)
        if name is None:
            unexpected.append(key)
        elif "@" in name:
            target, _, group = name.partition("@")
            stacked.setdefault(target, {})[int(group)] = value.reshape(-1)
        else:
            plain[name] = value
    for target, found in stacked.items():
        if sorted(found) == list(range(groups)) and len({v.shape for v in found.values()}) == 1:
            plain[target] = torch.stack([found[group] for group in range(groups)])
        else:
            unexpected.append(f"{target} with timestep groups {sorted(found)} instead of 0..{groups - 1}")
    return plain, unexpected


def official_to_ours(key: str, prefixes: list[tuple[str, str]]) -> str | None:
    """Return SRUNet's name of an official key, ``name@group`` for one group of a stacked parameter, or None."""
    for official, ours in prefixes:
        if key.startswith(f"{official}."):
            inside = key[len(official) + 1 :]
            for pattern, replacement in (*_INSIDE, *_BINARY):
                inside = re.sub(pattern, replacement, inside)
            return f"{ours}.{inside}"
    return None
