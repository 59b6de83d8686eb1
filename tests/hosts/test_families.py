"""The generated table of families in docs/howto/hosts.md."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "tools" / "families.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("families", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


families = load_script()
ROWS = [pytest.param(f, id=f.name, marks=[pytest.mark.slow] if f.slow else []) for f in families.FAMILIES]


@pytest.mark.parametrize("family", ROWS)
def test_the_table_is_up_to_date(family: Any) -> None:
    pytest.importorskip(family.module.split(".")[0], reason="needs the extra `zoo`")
    line = families.table((family,)).splitlines()[-1]
    assert line in families.PAGE.read_text(encoding="utf-8").splitlines()


def test_the_table_has_no_other_rows() -> None:
    text = families.PAGE.read_text(encoding="utf-8")
    lines = text.split("<!-- families:begin -->")[1].split("<!-- families:end -->")[0].strip().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [family.name for family in families.FAMILIES]
