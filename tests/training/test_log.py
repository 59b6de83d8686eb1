"""``log.csv``: every run writes it, a resumed run continues it, and a full disk is one line."""

import csv
from pathlib import Path
from typing import Any

import pytest
from training_case import RESUME, SMALLEST

from binarize.errors import BinarizeError
from binarize.training import train
from binarize.training.csv_log import CsvLog


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_and_its_resume_write_one_table(recipe: Any, pictures: Path, capfd: Any) -> None:
    options = (*SMALLEST, f"validation_data_dir={pictures}", "num_validation_images=1", "validation_steps=2")
    result = train(recipe(*options, "max_train_steps=4"))
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines if "samples/s" in line] == [f"step {n}" for n in range(1, 5)]
    found = rows(result.output_dir)
    assert [row["step"] for row in found] == ["1", "2", "2", "3", "4", "4"]
    for entry, row in zip(result.history, [row for row in found if row["loss"]], strict=True):
        assert (float(row["loss"]), float(row["learning_rate"])) == (entry.loss, entry.learning_rate)
        assert float(row["samples_per_second"]) == entry.samples_per_second
    quality = {int(row["step"]): float(row["validation_psnr"]) for row in found if row["validation_psnr"]}
    assert quality == result.validation
    with (result.output_dir / "log.csv").open("a") as file:
        file.write("99,of a killed run\n5,0.1")
    train(recipe(*options, "max_train_steps=6", RESUME), progress=False)
    assert [row["step"] for row in rows(result.output_dir)] == ["1", "2", "2", "3", "4", "4", "5", "6", "6"]
    assert rows(result.output_dir)[:6] == found


def test_a_table_of_other_columns_is_replaced(tmp_path: Path) -> None:
    CsvLog(tmp_path, 0).write(step=1, loss=0.5)
    again = CsvLog(tmp_path, 1)
    again.write(step=2, loss=0.25, flips=None)
    assert [row["loss"] for row in rows(tmp_path)] == ["0.5", "0.25"]
    CsvLog(tmp_path, 2, ("task", "output")).write(step=3, **{"loss/task": 1.0})
    assert [(row["step"], row["loss/task"]) for row in rows(tmp_path)] == [("3", "1.0")]
    CsvLog(tmp_path, 0)
    assert rows(tmp_path) == []


def test_a_line_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    table = CsvLog(tmp_path, 0)
    table.path.unlink()
    table.path.mkdir()
    with pytest.raises(BinarizeError, match=r"log\.csv: cannot be written: ") as caught:
        table.write(step=1)
    assert "\n" not in str(caught.value)
