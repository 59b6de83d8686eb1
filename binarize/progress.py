"""A progress bar that a log can hold: redrawn in place on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

LINE_PERCENT, LINE_SECONDS = 10, 30
_LINE = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class ProgressBar(tqdm):
    """A drop-in replacement for `tqdm`, with the same arguments and, on a terminal or in a notebook, the same display.

    Elsewhere it writes one line without control characters every 10% or 30 seconds, and a last one when it is closed,
    if there was progress and `leave` is not false.
    """

    _logs = False
    _line: tuple[float, float] | None = None  # items and seconds at the last line

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Redraw the bar on a terminal. Elsewhere, write a line if one is due."""
        if not self._writes_lines():
            return super().display(msg, pos)
        if hasattr(self, "start_t") and not self._logs and self._line_is_due():
            self._write_line()
        return True

    def log(self, text: str) -> None:
        """Away from a terminal, write a line of the caller's, which from now on replace those of the bar."""
        if self._writes_lines():
            self.fp.write(f"{text}\n")
            self.fp.flush()
            self._logs = True

    def clear(self, nolock: bool = False) -> None:
        """Clear the bar from a terminal. Elsewhere, do nothing."""
        if not self._writes_lines():
            super().clear(nolock=nolock)

    def close(self) -> None:
        """Close the bar. Away from a terminal, write the last line first."""
        if self._writes_lines():
            leave = self.pos == 0 if self.leave is None else self.leave
            if leave and not self._logs and self.n != (self.initial if self._line is None else self._line[0]):
                self._write_line()
            self.sp = None  # tqdm's own close ends without output if there is no printer
        super().close()

    def _writes_lines(self) -> bool:
        return not self.disable and not self.gui and not (hasattr(self.fp, "isatty") and self.fp.isatty())

    def _line_is_due(self) -> bool:
        last_n, last_seconds = (self.initial, 0.0) if self._line is None else self._line
        if self.format_dict["elapsed"] - last_seconds >= LINE_SECONDS:
            return True
        parts = 100 // LINE_PERCENT
        return self.total is not None and self.total > 0 and parts * self.n // self.total > parts * last_n // self.total

    def _write_line(self) -> None:
        options = dict(self.format_dict)
        if options["bar_format"] is None and self.total:
            options["bar_format"] = _LINE
        self.fp.write(f"{self.format_meter(**options).strip()}\n")
        self.fp.flush()
        self._line = self.n, options["elapsed"]
