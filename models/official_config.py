"""The types and bounds of a released checkpoint's configuration; apart, because pydantic is imported when needed."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["OfficialConfig", "ValidationError"]


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
