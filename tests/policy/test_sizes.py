"""Small files, small functions: what is above the aim is printed, what is above the limit fails."""

import ast
import sys

import pytest

from tests.policy.sources import ROOT, modules, tree

MODULE_AIM, MODULE_LIMIT = 400, 600
FUNCTION_AIM, FUNCTION_LIMIT = 60, 100


def module_sizes():
    return {str(path): len((ROOT / path).read_text().splitlines()) for path in modules()}


def function_sizes():
    sizes = {}
    for path in modules():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                sizes[f"{path}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    return sizes


@pytest.mark.parametrize(
    ("sizes", "aim", "limit"),
    [(module_sizes, MODULE_AIM, MODULE_LIMIT), (function_sizes, FUNCTION_AIM, FUNCTION_LIMIT)],
    ids=["modules", "functions"],
)
def test_nothing_is_longer_than_the_limit(sizes, aim, limit, capsys):
    found = sizes()
    above = sorted(((size, name) for name, size in found.items() if size > aim), reverse=True)
    with capsys.disabled():
        for size, name in above:
            sys.stdout.write(f"\n  {size} lines (aim {aim}): {name}")
    assert found
    assert not [(name, size) for size, name in above if size > limit]


@pytest.mark.parametrize("path", modules(), ids=str)
def test_every_return_is_typed_and_every_public_function_has_a_docstring(path):
    bare = []
    for node in ast.walk(tree(path)):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.returns is None
            and node.name != "__init__"
        ):
            bare.append(f"{node.name} (line {node.lineno}) has no return type")
    for scope in [
        tree(path),
        *(n for n in tree(path).body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")),
    ]:
        for node in scope.body:
            is_function = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if is_function and ast.get_docstring(node) is None:
                bare.append(f"{node.name} (line {node.lineno}) has no docstring")
    assert not bare, f"{path}: {bare}"
