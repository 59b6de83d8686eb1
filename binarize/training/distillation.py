"""Knowledge distillation: compare the predictions and block outputs of a student and a trained teacher."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.recipes import DistillationSection, GenerationDistillation
from binarize.recipes.errors import explain


class Distillation:
    """A student without wrappers, its trained teacher, and the outputs of their blocks of the same names.

    The teacher is on the student's device; it is put into evaluation mode and gets no gradients. ``autocast`` returns
    the context manager for its forward pass.
    """

    def __init__(
        self,
        section: DistillationSection,
        student: nn.Module,
        teacher: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.section, self.teacher, self.autocast = section, teacher.eval().requires_grad_(False), autocast
        self.student = student
        self._recording = False
        self._outputs: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        self.blocks = matching_blocks(section.blocks, student, teacher) if section.features else ()
        self.parts = ("task", "output", "features") if self.blocks else ("task", "output")
        for name in self.blocks:
            for network, outputs in zip((student, teacher), self._outputs, strict=True):
                network.get_submodule(name).register_forward_hook(self._store_in(outputs, name))

    def __call__(self, predict: Callable[[Any], Tensor], target: Tensor, student: Any = None) -> Tensor:
        """Return the mean loss of a batch, with squared errors, for training loops of your own.

        ``predict`` calls a network on the batch, as ``lambda network: network(noisy, timesteps).sample``. ``student``
        is the student in the wrapper of data parallelism or of ``torch.compile``, if it has one.
        """

        def squared(one: Tensor, other: Tensor) -> Tensor:
            return (one - other).square().flatten(1).mean(dim=1)

        _, total, _ = self.losses(predict, target, self.student if student is None else student, squared)
        return total.mean()

    def losses(
        self,
        predict: Callable[[Any], Tensor],
        target: Tensor,
        student: Any,
        distance: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the student's prediction, the weighted sum of the terms, and the terms, (B,) each."""
        section = self.section
        with self.recording():
            prediction = predict(student)
            teacher_prediction, features = self.compare(predict)
        parts = {"task": distance(prediction, target), "output": distance(prediction, teacher_prediction)}
        total = section.task * parts["task"] + section.output * parts["output"]
        if features is not None:
            total = total + section.features * features
            parts["features"] = features
        return prediction, total, parts

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the outputs of the blocks inside this context, and not when a backward pass recomputes them."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
            for outputs in self._outputs:
                outputs.clear()

    def compare(self, predict: Callable[[nn.Module], Tensor]) -> tuple[Tensor, Tensor | None]:
        """Run the teacher, as ``predict`` ran the student in its last forward pass, inside `recording`.

        Returns:
            The teacher's prediction, (B, C, H, W), and the mean over the blocks of |f / |f| - g / |g||^2 for the
            outputs f and g of student and teacher, (B,) in [0, 4]; None without features.
        """
        with torch.no_grad(), self.autocast():
            prediction = predict(self.teacher)
        if not self.blocks:
            return prediction, None
        return prediction, torch.stack([self._distance(name) for name in self.blocks]).mean(dim=0)

    def _distance(self, name: str) -> Tensor:
        ours, theirs = (outputs[name] for outputs in self._outputs)
        if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
            kinds = f"{type(ours).__name__} in the student and {type(theirs).__name__} in the teacher"
            raise BinarizeError(f"distillation.blocks: the output of {name} is a {kinds}; name blocks inside it.")
        if ours.shape != theirs.shape:
            shapes = f"{tuple(ours.shape)} in the student and {tuple(theirs.shape)} in the teacher"
            raise BinarizeError(f"distillation.blocks: the outputs of {name} are {shapes}; leave the block out.")
        dtype = torch.promote_types(ours.dtype, torch.float32)
        f, g = (F.normalize(features.flatten(1).to(dtype), dim=1) for features in (ours, theirs))
        return (f - g).square().sum(dim=1)

    def _store_in(self, outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self._recording:
                outputs[name] = output

        return hook


def distill(
    student: nn.Module,
    teacher: nn.Module,
    *,
    task: float = 1.0,
    output: float = 1.0,
    features: float = 0.0,
    blocks: tuple[str, ...] | None = None,
) -> Distillation:
    """Return a loss for a training loop of your own, by which a network learns from the data and from a teacher.

    ``loss = distill(student, teacher)`` before the loop, then in each step
    ``loss(lambda network: network(noisy, timesteps).sample, target).backward()``.

    Args:
        student: The network that is trained.
        teacher: A trained network on the same device; it is put into evaluation mode and gets no gradients.
        task: Weight of the squared error against the target.
        output: Weight of the squared error against the teacher's prediction.
        features: Weight of the mean over ``blocks`` of |f / |f| - g / |g||^2, for a block's outputs f and g.
        blocks: Names of blocks that both networks have; a star matches one part of a name. By default those of
            diffusers' U-Nets.

    Raises:
        BinarizeError: If a weight is negative, the teacher has none, or a pattern matches no block.
    """
    options: dict[str, Any] = {"task": task, "output": output, "features": features, "blocks": blocks}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        section = GenerationDistillation(teacher=Path(), **options)
    except ValidationError as error:
        raise BinarizeError(explain(error, "distill", "call", GenerationDistillation)) from None
    return Distillation(section, student, teacher, nullcontext)


def matching_blocks(patterns: tuple[str, ...], student: nn.Module, teacher: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules of both networks that match a pattern, in the student's order.

    A star matches one part of a dotted name, so ``middle.*`` is the blocks and not the modules inside them.
    """
    theirs = {name for name, _ in teacher.named_modules()}
    names = [name for name, _ in student.named_modules() if name in theirs]
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in names):
            found = f"the pattern {pattern!r} matches no module that student and teacher both have"
            depth = len(pattern.split("."))
            similar = [name for name in names if len(name.split(".")) == depth]
            examples = ", ".join((similar or names)[:3])
            raise BinarizeError(f"distillation.blocks: {found}; names look like {examples}.")
    return tuple(name for name in names if any(_matches(pattern, name) for pattern in patterns))


def _matches(pattern: str, name: str) -> bool:
    globs, parts = pattern.split("."), name.split(".")
    return len(globs) == len(parts) and all(map(fnmatch.fnmatchcase, parts, globs))
