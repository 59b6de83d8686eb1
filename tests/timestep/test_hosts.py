"""The timestep of networks that other people wrote: diffusers' U-Nets, and SR3's, k-diffusion's and ADM's style."""

from typing import Any

import pytest
import torch
from hosts_zoo import SIZE, unet2d, unet2d_condition
from torch import Tensor, nn
from zoo.parts import sinusoid
from zoo.sr3 import SR3UNet

import binarize
from binarize import Timestep
from binarize.layers.timestep_aware import Shift

SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
MOTION = {
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "motion_num_attention_heads": 2, "block_out_channels": (32, 64),
}  # fmt: skip


def noised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.double().eval().parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def groups_of(model: nn.Module, run: Any) -> list[int]:
    """Return the groups, of 5, that the last timestep-aware layer of a forward read."""
    seen: list[Tensor] = []
    shift = next(m for m in model.modules() if isinstance(m, Shift))
    shift.register_forward_pre_hook(lambda m, args: seen.append(m.context.group(5)))  # type: ignore[union-attr]
    run()
    return seen[-1].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["UNet3DConditionModel", "UNetMotionModel"])
def test_frames_in_the_batch_take_the_timestep_of_their_video(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    kinds = CROSS if name == "UNet3DConditionModel" else MOTION
    heads = {"attention_head_dim": 4} if name == "UNet3DConditionModel" else {"num_attention_heads": 2}
    model = getattr(diffusers, name)(**{**SMALL, **kinds, **heads}, cross_attention_dim=8)
    binarize.convert(model, "bidiffsr", linear=True, num_train_timesteps=1000)
    noised(model)
    video, t = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 900])
    text = torch.randn(2, 5, 8, dtype=torch.float64)

    def run(videos: slice, timesteps: Tensor) -> Tensor:
        texts = text[videos] if name == "UNet3DConditionModel" else text[videos].repeat_interleave(3, dim=0)
        out: Tensor = model(video[videos], timesteps, encoder_hidden_states=texts).sample
        return out

    with torch.no_grad():
        for pack in (lambda model: model, binarize.pack):
            pack(model)
            together = run(slice(2), t)
            for i in range(2):
                one = slice(i, i + 1)
                torch.testing.assert_close(together[one], run(one, t[one]), rtol=0, atol=1e-8)
            assert (run(slice(2), t.flip(0)) - together).abs().max() > 1e-3


def test_fourier_embeddings_of_diffusers_take_noise_levels() -> None:
    model = unet2d((8, 16), time_embedding_type="fourier")
    binarize.convert(model, "bidiffsr")
    assert any("noise levels" in note and "from 0.01 (clean) to 1348" in note for note in binarize.report(model).notes)
    sigmas, x = torch.tensor([0.011, 3.7, 1300.0]), torch.randn(3, 3, SIZE, SIZE)
    assert groups_of(model, lambda: model(x, sigmas)) == [0, 2, 4]

    upscaler = unet2d_condition(time_embedding_type="fourier", time_embedding_dim=32)
    binarize.convert(upscaler, "bidiffsr")
    values, text = torch.tensor([0.03, 0.65, 14.0]).log() / 4, torch.randn(3, 5, 8)
    latents = torch.randn(3, 4, SIZE, SIZE)
    assert groups_of(upscaler, lambda: upscaler(latents, values, encoder_hidden_states=text)) == [0, 2, 4]


def test_consistency_models_warn_until_they_are_told() -> None:
    x, values = torch.randn(2, 3, SIZE, SIZE), 250 * torch.tensor([0.002, 80.0]).log()
    with pytest.warns(UserWarning, match=r"UNet2DModel: the timestep in 'timestep' is read as 'steps' and was -1553"):
        binarize.convert(unet2d((8, 16)), "bidiffsr")(x, values)
    model = binarize.convert(
        unet2d((8, 16)), "bidiffsr", timestep=Timestep("timestep", "log_sigma", (-1554, 1096)), structure="keep"
    )
    assert groups_of(model, lambda: model(x, values)) == [0, 4]


def test_classes_of_diffusers_whose_timestep_is_no_step_are_known() -> None:
    diffusers = pytest.importorskip("diffusers")
    flux = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    binarize.convert(flux, "bidiffsr", linear=True)
    tokens = {"encoder_hidden_states": torch.randn(2, 3, 8), "pooled_projections": torch.randn(2, 8)}
    places = {"txt_ids": torch.zeros(3, 3), "img_ids": torch.zeros(4, 3)}
    run = {"hidden_states": torch.randn(2, 4, 4), "timestep": torch.tensor([0.1, 0.5]), **tokens, **places}
    assert groups_of(flux, lambda: flux(**run)) == [0, 2]
    video = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32), down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), layers_per_block=1,
        num_attention_heads=2, cross_attention_dim=8, projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )  # fmt: skip
    binarize.convert(video, "bidiffsr")
    frames, text = torch.randn(2, 3, 8, 8, 8), torch.randn(2, 1, 8)
    levels = torch.tensor([0.01, 600.0]).log() / 4
    ids = torch.tensor([[6.0, 127.0, 0.02]] * 2)
    assert groups_of(video, lambda: video(frames, levels, text, ids)) == [0, 4]


def test_sr3_in_its_own_form_takes_noise_levels() -> None:
    model, x = binarize.convert(SR3UNet(), "bidiffsr"), torch.randn(3, 3, SIZE, SIZE)
    assert any("'time' is taken for steps" in note for note in binarize.report(model).notes)
    with pytest.warns(UserWarning, match="'time' is read as 'steps' and was 0.9"):
        model(x, torch.tensor([0.9, 0.5, 0.1]))
    told = binarize.convert(SR3UNet(), "bidiffsr", timestep={"kind": "noise_level"})
    assert groups_of(told, lambda: told(x, torch.tensor([0.9, 0.5, 0.1]))) == [0, 2, 4]
    assert binarize.inspect.tar_biases(told)._label(1, 5) == "0.2-0.4"
    told(x, torch.tensor([0.9, 0.5, 0.1])).square().sum().backward()
    shift = next(m for m in told.modules() if isinstance(m, Shift))
    assert shift.bias.grad is not None
    assert [bool(row.any()) for row in shift.bias.grad] == [True, False, True, False, True]


class Preconditioned(nn.Module):
    """k-diffusion's style: the wrapper takes sigma and scales what goes in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Linear(16, 16)
        self.proj_in, self.proj_out = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 3, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, input: Tensor, sigma: Tensor, mapping_cond: Tensor | None = None) -> Tensor:
        c_in = (sigma**2 + 0.25).rsqrt().reshape(-1, 1, 1, 1)
        emb = self.mapping(sinusoid(sigma.log() / 4, 16))
        h = self.proj_in(input * c_in) + emb[:, :, None, None]
        for block in self.blocks:
            h = h + block(nn.functional.silu(h))
        return self.proj_out(h)


def test_k_diffusion_in_its_own_form_takes_sigma() -> None:
    model = binarize.convert(Preconditioned(), "bidiffsr")
    assert any("'sigma' is taken for the standard deviation" in note for note in binarize.report(model).notes)
    x, sigma = torch.randn(3, 3, SIZE, SIZE), torch.tensor([0.01, 0.5, 70.0])
    assert groups_of(model, lambda: model(x, sigma)) == [0, 2, 4]
    assert groups_of(model, lambda: model.forward(x, sigma=sigma.flip(0))) == [4, 2, 0]
