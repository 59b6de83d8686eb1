"""The one answer of packed operators to who asks for a gradient."""

from __future__ import annotations

from typing import Any, NoReturn

from binarize.errors import BinarizeError


def refuse_gradient(ctx: Any, *grads: Any) -> NoReturn:
    """Be an operator's backward.

    Raises:
        BinarizeError: Always.
    """
    raise BinarizeError(
        "packed layers have no gradient; train the unpacked model, or call binarize.unpack(model), which gives +-1 "
        "latent weights and fixed scales."
    )
