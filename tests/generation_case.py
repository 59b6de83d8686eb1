"""A generation run that takes a second, and its images."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from binarize.recipes import GenerationRecipe, load_recipe

CLASSES = ("bars", "dots")
TINY_NETWORK = ("model.block_out_channels=[8, 16]", "model.layers_per_block=1", "model.norm_num_groups=4")
TINY = (
    *TINY_NETWORK, "train_batch_size=4",
    "max_train_steps=6", "learning_rate=1e-3", "lr_scheduler=constant", "lr_warmup_steps=0", "use_ema=false",
    "checkpointing_steps=3", "validation_steps=1000", "num_validation_images=4", "num_inference_steps=2",
    "logging_steps=1",
)  # fmt: skip
CONDITIONAL = f"classes=[{', '.join(CLASSES)}]"


def write_images(folder: Path, count: int = 6) -> Path:
    """Write ``count`` greyscale images of 8x8 pixels for each of two classes."""
    random = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 60, (8, 8), dtype=np.uint8)
            at = int(random.integers(1, 6))
            pixels[at : at + 2, slice(None) if name == "bars" else slice(at, at + 2)] = 255
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def tiny(images: Path, output: Path, *overrides: str) -> GenerationRecipe:
    """Return the tiny recipe with overrides."""
    where = (f"train_data_dir={images}", f"output_dir={output}")
    recipe: Any = load_recipe("generation/digits", [*TINY, *where, *overrides])
    return recipe
