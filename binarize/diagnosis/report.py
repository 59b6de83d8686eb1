"""What the doctor found, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass

HEALTHY, MISFIT, UNTRAINED, WEAK = "healthy", "configuration", "untrained network", "quality"


@dataclass(frozen=True)
class Trial:
    """One thing changed, and what the model gives with it.

    Attributes:
        cause: What would be wrong if this helps, such as "prediction type".
        change: What was changed.
        fix: How to change it for good.
        steps: Denoising steps that were taken.
        psnr: In dB on Y, as `binarize.evaluation.psnr`; None where nothing could be made of the result.
    """

    cause: str
    change: str
    fix: str
    steps: int
    psnr: float | None


@dataclass(frozen=True)
class Finding:
    """The verdict.

    Attributes:
        cause: "healthy"; or the cause of a trial; or "configuration" (it does not fit the weights), "untrained network"
            or "quality" (nothing is set wrong, the network is not good enough).
        words: What is the matter, in a sentence or two.
        fix: What to do; empty where nothing need be done.
    """

    cause: str
    words: str
    fix: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """What `binarize.diagnosis.doctor` found.

    Attributes:
        model: What was examined.
        finding: The verdict.
        scale: How many times it enlarges; None where it could not be loaded.
        steps: Denoising steps of ``psnr``.
        psnr: Of the model as it is, on the embedded picture, in dB on Y; None where it could not be run.
        bicubic: Of bicubic enlargement.
        trials: What was tried, in that order.
    """

    model: str
    finding: Finding
    scale: int | None = None
    steps: int | None = None
    psnr: float | None = None
    bicubic: float | None = None
    trials: tuple[Trial, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether the model enlarges better than bicubic does."""
        return self.finding.cause == HEALTHY

    def to_text(self) -> str:
        """Return the table and the verdict, as `binarize doctor` prints them."""
        lines = [f"model       {self.model}"]
        if self.psnr is not None and self.bicubic is not None:
            lines += [
                f"bicubic     {self.bicubic:6.2f} dB",
                f"this model  {self.psnr:6.2f} dB  {self.psnr - self.bicubic:+.2f}, x{self.scale}, "
                f"{_count(self.steps or 0)}",
            ]
            if self.trials:
                width = max(len(trial.change) for trial in self.trials)
                lines += ["", f"{'one thing changed':<{width}}    PSNR  to bicubic"]
                lines += [_row(trial, width, self.bicubic) for trial in self.trials]
            lines.append("")
        verdict = "healthy" if self.healthy else f"likely cause: {self.finding.cause}"
        lines += [verdict, f"  {self.finding.words}"]
        if self.finding.fix:
            lines += ["fix:", f"  {self.finding.fix}"]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_text()


def _row(trial: Trial, width: int, bicubic: float) -> str:
    if trial.psnr is None:
        return f"{trial.change:<{width}}       -"
    return f"{trial.change:<{width}}  {trial.psnr:6.2f}  {trial.psnr - bicubic:+.2f}, {_count(trial.steps)}"


def _count(steps: int) -> str:
    return f"{steps} step{'' if steps == 1 else 's'}"
