"""Predicates over measures: `loudness_lufs >= -50`, `abs(offset_s) <= 0.2`, `source_width >= 320 or null`.

    COLUMN | abs(COLUMN)    < <= > >= == !=    NUMBER    [or null]

A clip is kept when it meets every predicate. A measure that is null (not known, or not measurable) meets none, unless
the predicate ends in `or null`. Numbers are compared in the column's own precision, so that `peak <= 0.1` keeps a clip
whose stored peak is the float32 next to 0.1. Nothing is evaluated: the text is matched against this grammar alone.
"""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.errors import InputError

OPERATORS: dict[str, Callable[[Any, Any], np.ndarray]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_GRAMMAR = re.compile(
    r"\s*(?:(?P<column>\w+)|abs\s*\(\s*(?P<absolute>\w+)\s*\))"
    r"\s*(?P<operator><=|>=|==|!=|<|>)"
    r"\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"\s*(?P<null>\bor\s+null)?\s*",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class Predicate:
    """One condition on one column."""

    column: str
    absolute: bool
    operator: str
    bound: float
    null_passes: bool

    @property
    def text(self) -> str:
        """The predicate in one way of writing, which parses back equal."""
        left = f"abs({self.column})" if self.absolute else self.column
        return f"{left} {self.operator} {repr(self.bound).removesuffix('.0')}{' or null' if self.null_passes else ''}"

    def passes(self, table: pa.Table) -> np.ndarray:
        """bool [rows]: which rows of a table with the column meet it."""
        column = table[self.column]
        known = column.is_valid().to_numpy()
        values = column.fill_null(0).to_numpy()
        # A fraction cannot be put into an integer column's type; every integer here fits a double.
        dtype = np.float64 if np.issubdtype(values.dtype, np.integer) else values.dtype
        compared = np.abs(values) if self.absolute else values
        met = OPERATORS[self.operator](compared.astype(dtype), np.asarray(self.bound, dtype))
        return np.where(known, met, self.null_passes)


def filterable(schema: pa.Schema) -> list[str]:
    """The columns of a schema that a predicate may name: those of numbers."""
    return [f.name for f in schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]


def parse_predicates(texts: Sequence[str], columns: Sequence[str]) -> tuple[Predicate, ...]:
    """The predicates of a command line, in its order.

    Raises:
        InputError: none is given, one does not parse, or names another column than `columns`.
    """
    if not texts:
        raise InputError(f"--keep is missing: give predicates over {', '.join(columns)}, as --keep 'peak < 0.99'")
    return tuple(_parse(text, columns) for text in texts)


def _parse(text: str, columns: Sequence[str]) -> Predicate:
    found = _GRAMMAR.fullmatch(text)
    if found is None:
        raise InputError(
            f"--keep {text!r} is not a predicate; write COLUMN or abs(COLUMN), one of {' '.join(OPERATORS)}, a number "
            "and perhaps 'or null', as --keep 'loudness_lufs >= -50' 'abs(offset_s) <= 0.2 or null'"
        )
    column = found["column"] or found["absolute"]
    if column not in columns:
        raise InputError(f"--keep {text!r}: no measure '{column}'; there are {', '.join(columns)}")
    return Predicate(
        column=column,
        absolute=found["absolute"] is not None,
        operator=found["operator"],
        bound=float(found["number"]),
        null_passes=found["null"] is not None,
    )


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one predicate drops."""

    text: str
    num_null: int
    """Clips whose measure is not known."""
    alone: int
    """Dropped if it were the only one."""
    in_sequence: int
    """Dropped of those that the predicates before it kept."""
    left: int
    """Kept by it and all before it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What predicates do to the rows of a table of measures."""

    failed: np.ndarray
    """int [rows]: index of the first predicate that a row does not meet; -1 where it meets all."""
    effects: tuple[Effect, ...]


def judge(table: pa.Table, predicates: Sequence[Predicate]) -> Verdict:
    """Apply predicates in their order to a table of measures."""
    failed = np.full(table.num_rows, -1)
    effects = []
    for index, predicate in enumerate(predicates):
        met = predicate.passes(table)
        dropped = ~met & (failed < 0)
        failed[dropped] = index
        effects.append(
            Effect(
                text=predicate.text,
                num_null=table[predicate.column].null_count,
                alone=int((~met).sum()),
                in_sequence=int(dropped.sum()),
                left=int((failed < 0).sum()),
            )
        )
    return Verdict(failed=failed, effects=tuple(effects))


def effects_table(verdict: Verdict) -> str:
    """The effects as plain text, one line a predicate."""
    head = ("keep", "not known", "drops alone", "drops in turn", "left")
    rows = [(e.text, str(e.num_null), str(e.alone), str(e.in_sequence), str(e.left)) for e in verdict.effects]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        + "\n"
        for row in (head, *rows)
    )
