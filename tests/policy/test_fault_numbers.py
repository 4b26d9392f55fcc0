"""Every numbered fault that touches ingest, decoding, storage, datasets and training has a test that names it."""

import ast
import re

import pytest

from tests.policy.sources import ROOT

NUMBERS = (*range(1, 28), *range(30, 35))
"""Of the project's list of faults; 28, 29 and 35 onwards belong to training, tracking, rounds and weights."""


def fault_tests() -> dict[int, list[str]]:
    """Test functions by the numbers in their names (`test_fault_07_...`, `test_fault_22_24_...`)."""
    found: dict[int, list[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (match := re.match(r"test_fault((?:_\d+)+)_", node.name)):
                for number in match[1].strip("_").split("_"):
                    found.setdefault(int(number), []).append(f"{path.name}::{node.name}")
    return found


@pytest.mark.parametrize("number", NUMBERS)
def test_the_fault_has_a_test_named_after_it(number: int) -> None:
    assert fault_tests().get(number)
