"""Progress bars on a terminal, and as lines in a file."""

import io

import pytest
import tqdm.std
from tqdm.std import tqdm as plain_tqdm

from binarize.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


def run(clock: list[float], total: int | None, count: int, seconds: float, **options: object) -> list[str]:
    file = io.StringIO()
    with ProgressBar(total=total, file=file, **options) as bar:
        for _ in range(count):
            clock[0] += seconds
            bar.update()
    text = file.getvalue()
    assert not set(text) & set("\r\x1b\b")
    assert not text or text.endswith("\n")
    return text.splitlines()


def test_a_file_gets_a_line_every_ten_percent(clock: list[float]) -> None:
    lines = run(clock, 200, 200, 1, desc="train", unit="step")
    assert [line.split()[1] for line in lines] == [f"{percent}%|" for percent in range(10, 101, 10)]
    assert lines[0] == "train:  10%| 20/200 [00:20<03:00,  1.00step/s]"


def test_a_slow_loop_gets_a_line_every_thirty_seconds(clock: list[float]) -> None:
    assert [line.split()[1] for line in run(clock, 1000, 65, 1)] == ["30/1000", "60/1000", "65/1000"]
    assert [line.split()[0] for line in run(clock, None, 65, 1)] == ["30it", "60it", "65it"]
    assert len(run(clock, None, 1, 5, bar_format="{elapsed} {desc}", desc="first change")) == 1


def test_options_of_tqdm_still_apply(clock: list[float]) -> None:
    assert run(clock, 100, 3, 1, leave=False) == run(clock, 100, 3, 1, disable=True) == []
    assert [line.split()[0] for line in run(clock, 10, 3, 1, initial=5)] == ["60%|", "70%|", "80%|"]


def test_refreshes_and_messages_add_no_lines(clock: list[float]) -> None:
    file = io.StringIO()
    with ProgressBar(total=100, file=file) as bar:
        bar.set_postfix(loss=1.0)
        ProgressBar.write("a message", file=file)
        plain_tqdm.write("another", file=file)
    assert file.getvalue().splitlines() == ["a message", "another"]


def test_a_terminal_gets_what_tqdm_writes(clock: list[float]) -> None:
    outputs = []
    for kind in (plain_tqdm, ProgressBar):
        clock[0], file = 0.0, Terminal()
        for _ in kind(range(20), file=file, desc="sample", mininterval=0):
            clock[0] += 1
        kind.write("done", file=file)
        outputs.append(file.getvalue())
    assert outputs[0] == outputs[1]
    assert "\r" in outputs[0]
