"""The models of the page: ONNX files, and for each task a JSON file that lists them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from binarize.models import GenerationPipeline, SuperResolutionPipeline, default_model
from binarize.models.default import default_generator, shipped_scales
from binarize.onnx import export_onnx
from binarize.onnx.pipelines import Pipeline
from binarize.onnx.sampling import sampler_of


def shipped_models() -> dict[str, Pipeline]:
    """Return the default model of each scale and the default generator, which come with the package."""
    models: dict[str, Pipeline] = {
        f"×{scale}": SuperResolutionPipeline.from_pretrained(default_model(scale)) for scale in shipped_scales()
    }
    generator = default_generator()
    return {**models, generator.name: GenerationPipeline.from_pretrained(generator)}


def write_models(folder: Path, models: Mapping[str, Pipeline]) -> None:
    """Write models, by the names that the page shows, into a folder that a server may serve with the page.

    ``enlarge.json`` and ``draw.json`` list those that upscale and those that generate images, and are written if there
    are any.

    Raises:
        BinarizeError: If a model cannot be exported, or its sampler is not DDIM, which alone the page has.
    """
    listed: dict[str, list[dict[str, str]]] = {}
    for name, pipeline in models.items():
        sampler_of(pipeline.scheduler, pipeline.num_inference_steps)  # raises for others than DDIM
        task = "draw" if isinstance(pipeline, GenerationPipeline) else "enlarge"
        entries = listed.setdefault(task, [])
        file = f"{task}/{len(entries)}.onnx"
        (folder / task).mkdir(parents=True, exist_ok=True)
        export_onnx(pipeline, folder / file, force=True)
        entries.append({"name": name, "file": file})
    for task, entries in listed.items():
        text = json.dumps(entries, ensure_ascii=False, indent=2)
        (folder / f"{task}.json").write_text(text + "\n", encoding="utf-8")
