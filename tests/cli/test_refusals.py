"""What the command line refuses, it refuses before it imports PyTorch, which takes seconds."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from binarize.models.default import default_model

RUN = """
import contextlib, io, json, sys
from binarize.cli import app
for line in sys.stdin:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            app(json.loads(line))
        except SystemExit as end:
            status = end.code
    heavy = [name for name in ("torch", "diffusers", "numba") if name in sys.modules]
    print(json.dumps([status, errors.getvalue(), heavy]), flush=True)
    if heavy:
        break
"""

# A command line, and what its error says. The files are those of `folder`.
REFUSED = [
    ("upscale none.png", "none.png: no such file or folder"),
    ("upscale notes.png", "notes.png: is not an image"),
    ("upscale photo.png", "photo_x2.png: already exists"),
    ("upscale photo.png -o photo.png", "photo.png: is one of the source images"),
    ("upscale photo.png -o none/out.png", "the folder none does not exist"),
    ("upscale photo.png other.png -o out.png", "out.png: is a file; several images need a folder"),
    ("upscale photo.png -o out.png --format jpeg", "is not the name of a jpeg file"),
    ("upscale photo.png -o large.png --scale 3", "no model for scale 3 comes with binarize"),
    ("upscale photo.png -o large.png --model none", "none: no such file or folder"),
    ("upscale photo.png -o large.png --model empty", "empty: holds no model"),
    ("upscale photo.png -o large.png --model notes.png", "notes.png: is not a model"),
    ("upscale photo.png -o large.png --model lost", "safetensors: is missing; the model is incomplete"),
    ("upscale photo.png -o large.png --model emoji", "is a GenerationPipeline, not a SuperResolutionPipeline"),
    ("upscale photo.png -o large.png --model x2 --scale 4", "--scale 4: x2 upscales by 2"),
    ("upscale photo.png -o large.png --model x2 --revision main", "--revision main: x2 is on this machine"),
    ("upscale photo.png -o large.png --force --skip-existing", "give one"),
    ("upscale photo.png -o large.png --seed -1", "Invalid value for '--seed'"),
    ("upscale photo.png -o large.png --steps 0", "Invalid value for '--steps'"),
    ("upscale photo.png -o large.png --scheduler euler", "Invalid value for '--scheduler'"),
    ("upscale photo.png -o large.png --dtype int8", "Invalid value for '--dtype'"),
    ("upscale photo.png --format gif", "Invalid value for '--format'"),
    ("generate out.png --model emoji", "out.png: already exists"),
    ("generate out.xyz", "cannot write images with the suffix '.xyz'"),
    ("generate new.png --model none", "none: no such file or folder"),
    ("generate new.png --model x2", "x2: upscales images"),
    ("evaluate none --data photos", "none: no such file or folder"),
    ("evaluate x2 --data none", "none: no such folder"),
    ("evaluate x2 --data empty", "empty: holds no images"),
    ("evaluate x2 --data photos --degradation blurr", "degradation"),
    ("evaluate x2 --data photos --number 3", "--number: x2 upscales images"),
    ("evaluate emoji --data photos --scale 2", "--scale: emoji generates images"),
    ("evaluate x2 --data photos --output results", "already exists"),
    ("pack none new", "none: no such file or folder"),
    ("pack x2 lost", "lost: already holds a model"),
    ("pack emoji new --scale 2", "--scale 2: emoji generates images"),
    ("export none new.onnx", "none: no such file or folder"),
    ("export x2 out.png", "out.png: already exists"),
    ("export x2 none/new.onnx", "the folder none does not exist"),
    ("doctor none", "none: no such file or folder"),
    ("doctor emoji", "is a GenerationPipeline"),
    ("summary none", "unknown recipe 'none'"),
    ("summary none.yaml", "there is no recipe file 'none.yaml'"),
    ("summary x2 --size 256", "--size 256: must be height and width"),
    ("summary x2 --format xml", "Invalid value for '--format'"),
    ("summary lost", "safetensors: is missing"),
    ("import-official none.pth new --scale 2", "none.pth: is not a file"),
    ("import-official none.pth x2 --scale 2", "x2: already holds a model"),
    ("import-official none.pth new --scale 2 inner=32", "unknown configuration name 'inner'"),
    ("import-official none.pth new --scale 2 inner", "'inner' is not KEY=VALUE"),
    ("train none", "unknown recipe 'none'"),
    ("train none.yaml", "there is no recipe file 'none.yaml'"),
    ("train small_x2 max_steps=3", "max_steps"),
    ("train small_x2 train_data_dir=none", "there is no folder 'none'"),
    ("train small_x2 train_data_dir=photos output_dir=run", "output_dir: run already holds a run"),
    ("train small_x2 --resume latest resume_from_checkpoint=latest", "mean the same; give one"),
    ("ablate none", "unknown study 'none'"),
    ("ablate small_methods seed=1", "seed"),
    ("demo --output run", "run: holds a demonstration"),
    ("demo --output new max_steps=3", "max_steps"),
    ("recipes show none", "unknown recipe 'none'"),
    ("recipes cp small_x2 out.png", "must end in .yaml"),
    ("recipes validate small_x2 train_batch_size=none", "train_batch_size"),
    ("web --scale 2", "--revision and --scale need --model"),
    ("web --model none", "none: no such file or folder"),
]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list]]:
    folder = tmp_path_factory.mktemp("refused")
    for name in ("empty", "photos", "run", "results"):
        (folder / name).mkdir()
    for name in ("photo.png", "other.png", "out.png", "photos/a.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    Image.new("RGB", (16, 16)).save(folder / "photo_x2.png")
    for name in ("notes.png", "run/recipe.yaml", "run/report.md", "results/evaluation.json"):
        (folder / name).write_text("text")
    for name in ("x2", "lost"):
        shutil.copytree(default_model(2), folder / name)
    for weights in (folder / "lost").rglob("*.safetensors"):
        weights.unlink()
    shutil.copytree(folder / "x2", folder / "emoji")
    index = folder / "emoji" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "GenerationPipeline"}))
    lines = "".join(json.dumps(command.split()) + "\n" for command, _ in REFUSED)
    done = subprocess.run([sys.executable, "-c", RUN], input=lines, cwd=folder, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return folder, {command: answer for (command, _), answer in zip(REFUSED, found, strict=False)}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "error"), REFUSED, ids=[command for command, _ in REFUSED])
def test_is_refused_before_torch_is_imported(refused: tuple[Path, dict[str, list]], command: str, error: str) -> None:
    folder, answers = refused
    if command not in answers:
        pytest.fail("an earlier command imported PyTorch")
    status, message, heavy = answers[command]
    assert status in (1, 2)
    assert error in message
    assert heavy == []
    assert "unexpected" not in message
    assert not [name for name in ("new", "new.png", "large.png", "new.onnx", "runs") if (folder / name).exists()]
