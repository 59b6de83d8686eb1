"""The types and bounds of a released checkpoint's configuration; apart, because pydantic is imported when needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from binarize.errors import BinarizeError, did_you_mean

__all__ = ["OfficialConfig", "ValidationError", "check_names"]


class OfficialConfig(BaseModel):
    """The types and bounds of `OFFICIAL_CONFIG`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    in_channel: Annotated[int, Field(ge=2, le=64)]
    out_channel: Annotated[int, Field(ge=1, le=64)]
    inner_channel: Annotated[int, Field(ge=2, le=1024)]
    norm_groups: Annotated[int, Field(ge=1, le=1024)]
    channel_mults: Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(min_length=1, max_length=8)]
    attn_res: Annotated[list[int], Field(max_length=8)]
    res_blocks: Annotated[int, Field(ge=1, le=16)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    image_size: Annotated[int, Field(ge=1, le=65536)]
    fp_res: Annotated[list[int], Field(max_length=8)]
    total_step: Annotated[int, Field(ge=1, le=100_000)]
    dynamic_group: Annotated[int, Field(ge=1, le=1000)]


def check_names(names: Iterable[str]) -> None:
    """Check that names are those of the released configuration."""
    for key in names:
        if key not in OfficialConfig.model_fields:
            known, hint = ", ".join(OfficialConfig.model_fields), did_you_mean(key, OfficialConfig.model_fields)
            raise BinarizeError(f"load_official: unknown configuration name {key!r}; names: {known}.{hint}")
