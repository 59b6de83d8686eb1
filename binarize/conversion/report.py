"""The report of a conversion: one row for each layer, new block and weight of an unknown class, with the reason."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from binarize.tables import Column, Table

_WORTH_SAYING = 0.1  # the share of all parameters that linear=True must add to be mentioned

Action = Literal["binary", "kept", "new"]


@dataclass(frozen=True)
class ReportRow:
    """One module: its path, class and weight shape, what was done to it, how or why, and its number of weights.

    ``action`` is "binary" (replaced), "kept" (full precision) or "new" (created by the structure pass).
    """

    name: str
    type: str
    action: Action
    detail: str
    weights: int = 0


@dataclass(frozen=True)
class ConversionReport:
    """Every module that a conversion examined, and remarks on the whole model; str() gives a table for a terminal.

    Attributes:
        rows: One `ReportRow` for each layer and each new block.
        notes: Remarks on the whole model.
        parameters: Number of all parameters of the model before its layers became binary.
        binary_parameters: Number of those that are binary weights.
        with_linear: Number of those that would be binary weights under ``linear=True``.
    """

    method: str
    host: str
    structure: str
    rows: tuple[ReportRow, ...]
    notes: tuple[str, ...] = ()
    parameters: int = 0
    binary_parameters: int = 0
    with_linear: int = 0

    @property
    def replaced(self) -> list[ReportRow]:
        """Rows of the modules that became binary."""
        return [row for row in self.rows if row.action == "binary"]

    @property
    def kept(self) -> list[ReportRow]:
        """Rows of the modules that stayed full precision."""
        return [row for row in self.rows if row.action == "kept"]

    @property
    def new(self) -> list[ReportRow]:
        """Rows of the modules that the structure pass created."""
        return [row for row in self.rows if row.action == "new"]

    @property
    def binary_share(self) -> float:
        """Share of the weights of all convolutions, linear layers and unknown classes that are binary."""
        total = sum(row.weights for row in self.rows if row.action != "new")
        return sum(row.weights for row in self.replaced) / total if total else 0.0

    @property
    def parameter_share(self) -> float:
        """Share of all parameters of the model that are binary weights."""
        return self.binary_parameters / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        counts = Counter(row.action for row in self.rows)
        head = (
            f"{self.method} on {self.host}, structure {self.structure}: {counts['binary']} layers binary "
            f"({100 * self.parameter_share:.1f}% of all parameters), {counts['kept']} kept, {counts['new']} new blocks"
        )
        if self.with_linear - self.binary_parameters >= _WORTH_SAYING * self.parameters > 0:
            head += f"; linear=True would make {100 * self.with_linear / self.parameters:.1f}% binary"
        table = self._table(str).to_text(header=False) if self.rows else ""
        return "\n".join([head, *(f"note: {note}" for note in self.notes), table]).rstrip()

    def to_markdown(self) -> str:
        """Return the rows as a Markdown table."""
        return self._table("`{}`".format).to_markdown()

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain containers."""
        return asdict(self)

    def _table(self, name_format: Any) -> Table:
        columns = [Column("module", name_format), *map(Column, ("type", "action", "detail"))]
        return Table(columns, [(row.name, row.type, row.action, row.detail) for row in self.rows])
