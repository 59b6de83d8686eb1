"""Tiny configurations of diffusers, denoising-diffusion-pytorch and MONAI; each library is imported when it is used."""

from functools import partial
from typing import Any

from torch import nn

NARROW = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
HEADS = {"attention_head_dim": 4, "cross_attention_dim": 8}
CROSS_2D = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
CROSS_3D = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
CROSS_MOTION = {
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}
SPATIOTEMPORAL = {
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
}
DOWN_UP = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}


def _diffusers(name: str, **options: Any) -> nn.Module:
    import diffusers

    return getattr(diffusers, name)(**options)  # type: ignore[no-any-return]


def _lucidrains(name: str, **options: Any) -> nn.Module:
    import denoising_diffusion_pytorch

    return getattr(denoising_diffusion_pytorch, name)(**options)  # type: ignore[no-any-return]


def monai_unet(dimensions: int) -> nn.Module:
    """Return MONAI's DiffusionModelUNet in 2 or 3 dimensions, with self-attention in the second level."""
    from monai.networks.nets import DiffusionModelUNet

    size = {"channels": (8, 16), "attention_levels": (False, True), "num_res_blocks": 1, "num_head_channels": 4}
    return DiffusionModelUNet(dimensions, 3, 3, norm_num_groups=4, **size)  # type: ignore[no-any-return]


unet2d = partial(_diffusers, "UNet2DModel", **NARROW, **DOWN_UP, attention_head_dim=4)
condition = partial(_diffusers, "UNet2DConditionModel", **NARROW, **HEADS, **CROSS_2D)
controlnet = partial(
    _diffusers, "ControlNetModel", **{k: v for k, v in NARROW.items() if k != "sample_size"}, **HEADS,
    down_block_types=CROSS_2D["down_block_types"], conditioning_embedding_out_channels=(4, 8),
)  # fmt: skip
unet3d = partial(_diffusers, "UNet3DConditionModel", **NARROW, **HEADS, **CROSS_3D)
motion = partial(
    _diffusers, "UNetMotionModel", **NARROW, **CROSS_MOTION, num_attention_heads=2, cross_attention_dim=8,
    motion_max_seq_length=4, motion_num_attention_heads=2,
)  # fmt: skip
svd = partial(
    _diffusers, "UNetSpatioTemporalConditionModel", block_out_channels=(32, 64), layers_per_block=1, sample_size=8,
    **SPATIOTEMPORAL, num_attention_heads=(2, 2), cross_attention_dim=8, addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=12, num_frames=2,
)  # fmt: skip
unet1d = partial(
    _diffusers, "UNet1DModel", block_out_channels=(8, 16), sample_size=16, in_channels=4, out_channels=4,
    time_embedding_type="positional", use_timestep_embedding=True, flip_sin_to_cos=False, freq_shift=1.0,
    down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"), up_block_types=("UpResnetBlock1D",),
    mid_block_type="MidResTemporalBlock1D", out_block_type="OutConv1DBlock", layers_per_block=1,
    act_fn="mish", norm_num_groups=4, downsample_each_block=False,
)  # fmt: skip
dit = partial(
    _diffusers, "DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2,
    sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
)  # fmt: skip
pixart = partial(
    _diffusers, "PixArtTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4,
    out_channels=8, num_layers=1, cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=8,
    norm_num_groups=4,
)  # fmt: skip
sd3 = partial(
    _diffusers, "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=2,
    attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16,
    pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
)  # fmt: skip
flux = partial(
    _diffusers, "FluxTransformer2DModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
    attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
    guidance_embeds=False, axes_dims_rope=(2, 2, 4),
)  # fmt: skip
autoencoder = partial(
    _diffusers, "AutoencoderKL", block_out_channels=(8, 16), layers_per_block=1, latent_channels=2,
    norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    sample_size=16,
)  # fmt: skip
lucidrains = partial(_lucidrains, "Unet", dim=8, dim_mults=(1, 2), attn_dim_head=4, attn_heads=2, flash_attn=False)
lucidrains_1d = partial(_lucidrains, "Unet1D", dim=8, dim_mults=(1, 2), channels=3, attn_dim_head=4, attn_heads=2)
karras = partial(
    _lucidrains, "KarrasUnet", image_size=16, dim=8, dim_max=16, channels=3, num_downsamples=1,
    num_blocks_per_stage=1, attn_res=(8,), attn_dim_head=4, fourier_dim=8,
)  # fmt: skip
