"""Knowledge distillation: compare the predictions and block outputs of a student and a trained teacher."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.recipes import DistillationSection


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
        self._recording = False
        self._outputs: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        self.blocks = matching_blocks(section.blocks, student, teacher) if section.features else ()
        self.parts = ("task", "output", "features") if self.blocks else ("task", "output")
        for name in self.blocks:
            for network, outputs in zip((student, teacher), self._outputs, strict=True):
                network.get_submodule(name).register_forward_hook(self._store_in(outputs, name))

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
