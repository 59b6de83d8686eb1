"""What the zoo still shows to be wrong: the expectations are final, and each line is removed with its fault."""

_FAULTS: dict[str, dict[str, str]] = {
    "linear layers that read the input or the time, or give the output, under linear=True": {
        "srdiff": "layers",
        "pixart": "layers",
        "flux": "layers",
    },
}


def fault(name: str, stage: str) -> str | None:
    """Return why a row is known to fail in a stage, or None."""
    return next((reason for reason, rows in _FAULTS.items() if rows.get(name) == stage), None)
