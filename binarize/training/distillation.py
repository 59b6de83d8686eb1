"""Knowledge distillation: a trained network that tells the student what it would have predicted, and how."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from binarize.errors import BinarizeError

if TYPE_CHECKING:
    from binarize.recipes import DistillationSection


class Distillation:
    """A teacher beside a student, and the outputs of their blocks of the same names.

    Args:
        section: The recipe's keys.
        student: The network that learns, converted and not wrapped.
        teacher: The trained one, on the student's device; it is set to evaluation and gets no gradients.
        autocast: Makes the context that the teacher's forward runs in.

    Raises:
        BinarizeError: If features are compared and a pattern matches no block that both have.
    """

    def __init__(
        self,
        section: DistillationSection,
        student: nn.Module,
        teacher: nn.Module,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.section, self.teacher, self.autocast = section, teacher.eval().requires_grad_(False), autocast
        self._listening = False
        self._of_student: dict[str, Tensor] = {}
        self._of_teacher: dict[str, Tensor] = {}
        self.blocks = matching_blocks(section.blocks, student, teacher) if section.features else ()
        for name in self.blocks:
            student.get_submodule(name).register_forward_hook(self._keep_in(self._of_student, name))
            teacher.get_submodule(name).register_forward_hook(self._keep_in(self._of_teacher, name))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While entered, the blocks' outputs are kept; not so when a backward recomputes them."""
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
            self._of_student.clear()
            self._of_teacher.clear()

    def teach(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the teacher on what the student has just seen, inside of `listening`.

        Args:
            noisy: (B, 3, H, W).
            timesteps: (B,).
            condition: (B, 3, H, W).

        Returns:
            The teacher's prediction, (B, 3, H, W), and the mean over the blocks of |f / |f| - g / |g||^2 for the
            outputs f and g of student and teacher, (B,) within 0..4; None without features.

        Raises:
            BinarizeError: If the outputs of two blocks differ in shape.
        """
        with torch.no_grad(), self.autocast():
            prediction = self.teacher(noisy, timesteps, condition).sample
        if not self.blocks:
            return prediction, None
        distances = [self._distance(name) for name in self.blocks]
        return prediction, torch.stack(distances).mean(dim=0)

    def _distance(self, name: str) -> Tensor:
        ours, theirs = self._of_student[name], self._of_teacher[name]
        if ours.shape != theirs.shape:
            raise BinarizeError(
                f"distillation: the outputs of {name} are {tuple(ours.shape)} in the student and "
                f"{tuple(theirs.shape)} in the teacher; leave the block out of distillation.blocks, or set features to "
                "0 and compare the predictions alone."
            )
        precise = torch.promote_types(ours.dtype, torch.float32)
        f, g = (F.normalize(features.flatten(1).to(precise), dim=1) for features in (ours, theirs))
        return (f - g).square().sum(dim=1)

    def _keep_in(self, kept: dict[str, Tensor], name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self._listening:
                kept[name] = output

        return keep


def matching_blocks(patterns: tuple[str, ...], student: nn.Module, teacher: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that the patterns match in both networks, in the student's order.

    A star stands for one step of a name, so that ``middle.*`` is the blocks and not all that they are made of.

    Raises:
        BinarizeError: If a pattern matches no module that both have.
    """
    theirs = dict(teacher.named_modules())
    found: list[str] = []
    for pattern in patterns:
        names = [name for name, _ in student.named_modules() if name in theirs and _matches(pattern, name)]
        if not names:
            raise BinarizeError(
                f"distillation.blocks: the pattern {pattern!r} matches no module that student and teacher both have; "
                "names look like encoder.0.blocks.0."
            )
        found += names
    order = {name: number for number, (name, _) in enumerate(student.named_modules())}
    return tuple(sorted(set(found), key=order.__getitem__))


def _matches(pattern: str, name: str) -> bool:
    steps, parts = pattern.split("."), name.split(".")
    return len(steps) == len(parts) and all(map(fnmatch.fnmatchcase, parts, steps))
