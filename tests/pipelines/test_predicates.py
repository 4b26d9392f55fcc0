"""Predicates keep what a plain Python filter keeps; the grammar takes nothing else; counts add up."""

import operator

import numpy as np
import pyarrow as pa
import pytest

from models.spec import SPECS
from pipelines.curation.predicates import Predicate, effects_table, filterable, judge, parse_predicates
from pipelines.data.contracts import MEASURES
from pipelines.errors import InputError

COLUMNS = filterable(MEASURES.schema(SPECS["tiny"]))
PLAIN = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def random_table(rng: np.random.Generator, rows: int) -> pa.Table:
    """Measures on a coarse grid, so that bounds are hit exactly, a fifth of them null."""
    grid = np.array([-2.0, -1.0, -0.5, -0.1, 0.0, 0.1, 0.2, 0.5, 1.0, 2.0])
    columns: dict[str, pa.Array] = {}
    for name, kind in (("loudness_lufs", pa.float32()), ("num_cuts", pa.int32()), ("valid_s", pa.float64())):
        values = rng.choice(grid, rows)
        values = np.round(values) if pa.types.is_integer(kind) else values
        kept = [None if rng.random() < 0.2 else value for value in values.tolist()]
        columns[name] = pa.array([None if v is None else int(v) if kind == pa.int32() else v for v in kept], kind)
    return pa.table(columns)


def plainly(row: dict[str, float | None], predicate: Predicate, dtype: type) -> bool:
    value = row[predicate.column]
    if value is None:
        return predicate.null_passes
    return bool(PLAIN[predicate.operator](abs(value) if predicate.absolute else value, dtype(predicate.bound)))


def test_predicates_keep_what_a_plain_filter_keeps() -> None:
    rng = np.random.default_rng(0)
    precision = {"loudness_lufs": np.float32, "num_cuts": float, "valid_s": float}
    for _ in range(150):
        table = random_table(rng, int(rng.integers(0, 40)))
        texts = []
        for _ in range(int(rng.integers(1, 5))):
            column = str(rng.choice(list(precision)))
            left = f"abs( {column} )" if rng.random() < 0.3 else column
            bound = rng.choice(["-1", "-.5", "0", "0.1", "+0.2", "5e-1", "1."])
            null = " or  null" if rng.random() < 0.3 else ""
            texts.append(f"{left}{rng.choice([' ', ''])}{rng.choice(list(PLAIN))} {bound}{null}")
        predicates = parse_predicates(texts, COLUMNS)
        verdict = judge(table, predicates)
        rows = table.to_pylist()
        for row, failed in zip(rows, verdict.failed, strict=True):
            met = [plainly(row, p, precision[p.column]) for p in predicates]
            assert failed == (met.index(False) if False in met else -1)
        assert sum(e.in_sequence for e in verdict.effects) + verdict.effects[-1].left == len(rows)
        assert all(e.in_sequence <= e.alone for e in verdict.effects)


def test_a_null_meets_no_predicate_unless_it_is_said() -> None:
    table = pa.table({"semantic": pa.array([None, 0.5], pa.float32())})
    for text in ("semantic > -9", "semantic != 3", "abs(semantic) >= 0"):
        assert judge(table, parse_predicates([text], COLUMNS)).failed.tolist() == [0, -1]
        assert judge(table, parse_predicates([f"{text} or null"], COLUMNS)).failed.tolist() == [-1, -1]


def test_a_bound_is_taken_in_the_precision_of_what_is_stored() -> None:
    table = pa.table({"peak": pa.array([0.1], pa.float32())})
    for text in ("peak <= 0.1", "peak >= 0.1", "peak == 0.1"):
        assert judge(table, parse_predicates([text], COLUMNS)).failed.tolist() == [-1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "peak",
        "peak <",
        "peak < x",
        "peak < nan",
        "peak < inf",
        "0.5 < peak",
        "peak < 1 and rms_db > 2",
        "peak < 1; import os",
        "abs(peak < 1",
        "abs(abs(peak)) < 1",
        "max(peak) < 1",
        "__import__('os') < 1",
        "peak = 1",
        "peak < 1 or",
        "peak < 1ornull",
        "peak < 1_0",
    ],
)
def test_what_is_no_predicate_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(InputError, match="is not a predicate; write COLUMN"):
        parse_predicates(["peak < 1", text], COLUMNS)


def test_an_unknown_column_and_one_that_is_no_number_are_refused_with_the_list() -> None:
    for column in ("loudnes", "cuts_s", "split", "clip_id", "reward_invalid"):
        with pytest.raises(InputError, match=f"no measure '{column}'; there are valid_s, peak, rms_db, .*offset_s"):
            parse_predicates([f"{column} > 1"], COLUMNS)
    with pytest.raises(InputError, match="--keep is missing"):
        parse_predicates([], COLUMNS)


def test_a_predicate_written_in_its_own_way_parses_back_equal() -> None:
    texts = ["abs(offset_s)<=.2", "num_cuts==0 or null", "rms_db >= -5e1"]
    predicates = parse_predicates(texts, COLUMNS)
    assert [p.text for p in predicates] == ["abs(offset_s) <= 0.2", "num_cuts == 0 or null", "rms_db >= -50"]
    assert parse_predicates([p.text for p in predicates], COLUMNS) == predicates


def test_the_table_tells_each_predicate_alone_and_in_turn() -> None:
    table = pa.table({"peak": pa.array([0.1, 0.5, 0.9, None], pa.float32())})
    lines = effects_table(judge(table, parse_predicates(["peak > 0.2", "peak > 0.6"], COLUMNS))).splitlines()
    assert [line.split()[-4:] for line in lines[1:]] == [["1", "2", "2", "2"], ["1", "3", "1", "1"]]
