"""The check that most tests of invalid input make."""

from collections.abc import Callable
from typing import Any

import pytest

from binarize.errors import BinarizeError


def assert_error(message: str, call: Callable[..., Any], /, *args: Any, **options: Any) -> None:
    """Check that a call raises a BinarizeError whose message matches a regular expression."""
    with pytest.raises(BinarizeError, match=message):
        call(*args, **options)
