"""The models of the page: ONNX files, and ``models.json``, which lists them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from binarize.models import SuperResolutionPipeline, default_model
from binarize.models.default import shipped_scales
from binarize.onnx import export_onnx
from binarize.onnx.sampling import sampler_of


def shipped_models() -> dict[str, SuperResolutionPipeline]:
    """Return the default model of each scale that comes with the package."""
    return {f"×{scale}": SuperResolutionPipeline.from_pretrained(default_model(scale)) for scale in shipped_scales()}


def write_models(folder: Path, models: Mapping[str, SuperResolutionPipeline]) -> None:
    """Write models, by the names that the page shows, into a folder that a server may serve with the page.

    Raises:
        BinarizeError: If a model cannot be exported, or its sampler is not DDIM, which alone the page has.
    """
    listed = []
    for index, (name, pipeline) in enumerate(models.items()):
        sampler_of(pipeline.scheduler, pipeline.num_inference_steps)  # raises for others than DDIM
        file = f"models/{index}-x{pipeline.scale}.onnx"
        (folder / "models").mkdir(parents=True, exist_ok=True)
        export_onnx(pipeline, folder / file, force=True)
        listed.append({"name": name, "file": file})
    text = json.dumps(listed, ensure_ascii=False, indent=2)
    (folder / "models.json").write_text(text + "\n", encoding="utf-8")
