"""Train a 1-bit network that generates images, in the manner of diffusers' script of this name.

    accelerate launch examples/train_unconditional.py --train_data_dir photos --method bidiffsr --use_ema

With --teacher, a pipeline's folder, the network starts from a full-precision twin and learns from its predictions.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

import binarize
from binarize.training import distill
from binarize.training.image_folder import LabelledImages

CARD = """---
library_name: diffusers
tags: [binarize, unconditional-image-generation, diffusion]
---
# {name}

A diffusion model with 1-bit weights and activations ({method}), trained on images of {side}x{side} pixels by
binarize.

```text
{summary}
```

```python
import binarize  # pip install binarize-diffusion
from diffusers import DDPMPipeline

image = DDPMPipeline.from_pretrained("{name}")().images[0]
```
"""


def parse_args() -> argparse.Namespace:
    """Return the command line; the names are those of diffusers' script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", type=Path, required=True, help="Folder of images.")
    parser.add_argument("--output_dir", type=Path, default=Path("ddpm-1bit"))
    parser.add_argument("--method", default="bidiffsr", help="A method of binarize, or none.")
    parser.add_argument("--structure", default="keep", choices=["auto", "keep", "cp_cs", "contract"])
    parser.add_argument("--teacher", type=Path, help="Folder of a full-precision pipeline to start and learn from.")
    parser.add_argument("--model_config_name_or_path", help="Configuration of a UNet2DModel; by default a small one.")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--center_crop", action="store_true")
    parser.add_argument("--random_flip", action="store_true")
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--eval_batch_size", type=int, default=16)
    parser.add_argument("--num_epochs", type=int, default=100)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_scheduler", default="cosine")
    parser.add_argument("--lr_warmup_steps", type=int, default=100)
    parser.add_argument("--adam_weight_decay", type=float, default=0.0)
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--ema_max_decay", type=float, default=0.999)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--prediction_type", default="epsilon", choices=["epsilon", "sample", "v_prediction"])
    parser.add_argument("--ddpm_num_steps", type=int, default=1000)
    parser.add_argument("--ddpm_num_inference_steps", type=int, default=50)
    parser.add_argument("--ddpm_beta_schedule", default="squaredcos_cap_v2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--push_to_hub", action="store_true")
    parser.add_argument("--hub_model_id", help="By default the name of the output folder.")
    return parser.parse_args()


def build(args: argparse.Namespace, teacher: UNet2DModel | None) -> UNet2DModel:
    """Return the network, converted."""
    if teacher is not None:
        model = UNet2DModel.from_config(teacher.config)
        model.load_state_dict(teacher.state_dict())
    elif args.model_config_name_or_path:
        model = UNet2DModel.from_config(UNet2DModel.load_config(args.model_config_name_or_path))
    else:
        model = UNet2DModel(
            sample_size=args.resolution,
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
            norm_num_groups=8,
        )
    if args.method == "none":
        return model
    # "keep" keeps all weights of a trained network; "cp_cs" replaces some blocks, which must be trained anew.
    return binarize.convert(model, args.method, structure=args.structure, num_train_timesteps=args.ddpm_num_steps)


def main() -> None:
    """Train, pack and save."""
    args = parse_args()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    torch.manual_seed(args.seed)
    scheduler = DDPMScheduler(
        args.ddpm_num_steps, beta_schedule=args.ddpm_beta_schedule, prediction_type=args.prediction_type
    )
    teacher = None if args.teacher is None else DDPMPipeline.from_pretrained(args.teacher).unet.to(accelerator.device)
    unet = build(args, teacher)
    images = LabelledImages(
        args.train_data_dir, resolution=args.resolution, channels=unet.config.in_channels, seed=args.seed,
        center_crop=args.center_crop, random_flip=args.random_flip,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(images, batch_size=args.train_batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(
        binarize.param_groups(unet, weight_decay=args.adam_weight_decay), lr=args.learning_rate
    )
    model, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    total = args.num_epochs * math.ceil(len(loader) / args.gradient_accumulation_steps)
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": total}
    schedule = get_scheduler(args.lr_scheduler, optimizer, **steps)
    ema = EMAModel(unet.parameters(), decay=args.ema_max_decay) if args.use_ema else None
    distillation = None if teacher is None else distill(unet, teacher)

    def loss_of(clean: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(clean)
        timesteps = torch.randint(args.ddpm_num_steps, (len(clean),), device=clean.device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = {"epsilon": noise, "sample": clean}.get(args.prediction_type)
        target = scheduler.get_velocity(clean, noise, timesteps) if target is None else target

        def predict(network: torch.nn.Module) -> torch.Tensor:
            return network(noisy, timesteps).sample

        return F.mse_loss(predict(model), target) if distillation is None else distillation(predict, target, model)

    step = 0
    with tqdm(total=total, disable=not accelerator.is_main_process) as bar:
        for batch in (batch for _ in range(args.num_epochs) for batch in loader):
            with accelerator.accumulate(model):
                loss = loss_of(batch["image"])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                schedule.step()
                step += 1
                binarize.training_step(unet, step / total)  # methods whose gradient changes during training
                if ema is not None:
                    ema.step(unet.parameters())
                bar.set_postfix(loss=f"{loss.item():.4f}")
                bar.update()
    if accelerator.is_main_process:
        finish(args, unet, scheduler, ema)


def finish(args: argparse.Namespace, unet: UNet2DModel, scheduler: DDPMScheduler, ema: EMAModel | None) -> None:
    """Pack the network, save it as a pipeline with a model card and samples, and push it."""
    if ema is not None:
        ema.copy_to(unet.parameters())
    unet.eval()
    summary = binarize.summary(unet).to_text()
    if args.method != "none":
        binarize.pack(unet)
    pipeline = DDPMPipeline(unet, scheduler)
    pipeline.save_pretrained(args.output_dir)
    generator = torch.Generator(unet.device).manual_seed(args.seed)
    samples = pipeline(args.eval_batch_size, generator, args.ddpm_num_inference_steps).images
    (args.output_dir / "samples").mkdir(exist_ok=True)
    for number, image in enumerate(samples):
        image.save(args.output_dir / "samples" / f"{number:02}.png")
    name = args.hub_model_id or args.output_dir.name
    card = CARD.format(name=name, method=args.method, side=args.resolution, summary=summary)
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")
    if args.push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        repo = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo, folder_path=args.output_dir)


if __name__ == "__main__":
    main()
