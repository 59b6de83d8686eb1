"""The doctor's findings as data and as text."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from binarize.tables import Column, Table

HEALTHY, MISMATCH, UNTRAINED, WEAK = "healthy", "configuration", "untrained network", "quality"


def _renamed(old: str, new: str) -> Any:
    def get(self: Any) -> Any:
        warnings.warn(f"{type(self).__name__}.{old} is now {new}", DeprecationWarning, stacklevel=2)
        return getattr(self, new)

    return property(get)


@dataclass(frozen=True)
class ChangeResult:
    """The result of a model with one setting changed.

    ``cause`` is the cause if this `change` helps, such as "prediction type", and ``fix`` makes it permanent. ``psnr``,
    in dB on Y, is None if the result is not finite or the change does not apply.
    """

    cause: str
    change: str
    fix: str
    steps: int
    psnr: float | None


@dataclass(frozen=True)
class Finding:
    """The verdict.

    ``cause`` is "healthy", or the cause of a change, or "configuration" (it does not fit the weights), "untrained
    network" or "quality" (no setting is wrong; the network is not good enough). A healthy model has no ``fix``.
    """

    cause: str
    explanation: str
    fix: str = ""

    words = _renamed("words", "explanation")


@dataclass(frozen=True)
class DoctorReport:
    """The result of `binarize.diagnosis.doctor`: the verdict, and PSNR on the embedded image in dB on Y.

    ``psnr`` is that of the unchanged model with ``steps`` denoising steps, and ``results`` are those of the changes.
    What follows the finding is None or empty if the model could not be loaded.
    """

    model: str
    finding: Finding
    scale: int | None = None
    steps: int | None = None
    psnr: float | None = None
    bicubic: float | None = None
    results: tuple[ChangeResult, ...] = ()

    trials = _renamed("trials", "results")

    @property
    def healthy(self) -> bool:
        """Whether the model is better than bicubic upscaling."""
        return self.finding.cause == HEALTHY

    def to_text(self) -> str:
        """Return the table and the verdict as `binarize doctor` prints them."""
        lines = [f"model       {self.model}"]
        if self.psnr is not None and self.bicubic is not None:
            bicubic = self.bicubic
            lines.append(f"bicubic     {bicubic:6.2f} dB")
            gain = self.psnr - bicubic
            lines.append(f"this model  {self.psnr:6.2f} dB  {gain:+.2f}, x{self.scale}, steps: {self.steps}")
            if self.results:
                gains = [None if one.psnr is None else one.psnr - bicubic for one in self.results]
                rows = [[one.change, one.psnr, gain, one.steps] for one, gain in zip(self.results, gains, strict=True)]
                columns = [Column("one change"), Column("PSNR", ".2f"), Column("to bicubic", "+.2f"), Column("steps")]
                lines += ["", Table(columns, rows).to_text()]
            lines.append("")
        lines.append("healthy" if self.healthy else f"likely cause: {self.finding.cause}")
        lines.append(f"  {self.finding.explanation}")
        if self.finding.fix:
            lines += ["fix:", f"  {self.finding.fix}"]
        return "\n".join(lines)

    __str__ = to_text
