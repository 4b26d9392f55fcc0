"""What must not stand in the code or in the tree: loaders that run what they load, guesses at types, places."""

import ast
import re

import pytest

from tests.policy.sources import ROOT, modules, tracked_files, tree

JUSTIFIED_PICKLE: dict[str, str] = {
    "pipelines/data/units.py": "carries a unit from the driver to its own actors; never read from storage",
}
"""Module -> why it may import pickle."""
JUSTIFIED_GETATTR: dict[str, str] = {
    "jobs/cli.py": "to_yaml walks the declared fields of a dataclass by name",
}
"""Module -> why it may ask for attributes by name."""
UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib")
LOCK = "requirements.lock"
INDEX_OPTION = re.compile(
    r"^\s*(-i|--(extra-)?index-url|--find-links|--trusted-host)|@ https?://|^\s*(index-url|find-links)\s*=", re.M
)
HOME_PATH = re.compile(r"(?<![\w.~$}])/(home|root|Users|work)/[\w.-]+")
ALLOWED_HOME_PATHS = ("/home/ubuntu/",)


def calls(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(node, name):
    return next((ast.unparse(k.value) for k in node.keywords if k.arg == name), None)


def unsafe_loads(path):
    """Calls and imports that would run code out of a file."""
    found = []
    for name, node in calls(path):
        if name.endswith("torch.load") and keyword(node, "weights_only") != "True":
            found.append(f"torch.load without weights_only=True (line {node.lineno})")
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"):
            found.append(f"{name} (line {node.lineno})")
        if name.endswith("np.load") and keyword(node, "allow_pickle") not in (None, "False"):
            found.append(f"np.load with allow_pickle (line {node.lineno})")
    for node in ast.walk(tree(path)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"import {n} (line {node.lineno})" for n in names if n.split(".")[0] in UNSAFE_MODULES]
    return found


@pytest.mark.parametrize("path", modules(), ids=str)
def test_nothing_loads_what_can_run_code(path):
    if str(path) not in JUSTIFIED_PICKLE:
        assert not unsafe_loads(path), f"{path}: {unsafe_loads(path)}; use safetensors, safe_load, weights_only=True"


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(f)",
        "np.load(f, allow_pickle=True)",
        "import pickle",
        "from pickle import loads",
        "eval(text)",
    ],
)
def test_the_rule_would_find_it(line, monkeypatch):
    monkeypatch.setattr("tests.policy.test_forbidden.tree", lambda path: ast.parse(line))
    assert unsafe_loads("x")


@pytest.mark.parametrize("path", modules(), ids=str)
def test_nothing_guesses_at_attributes(path):
    if str(path) in JUSTIFIED_GETATTR:
        return
    guesses = [f"{n} (line {node.lineno})" for n, node in calls(path) if n in ("hasattr", "getattr", "setattr")]
    assert not guesses, f"{path}: {guesses}; say what the type is"


def test_no_exception_stands_for_a_module_that_is_gone_or_needs_none():
    paths = [str(path) for path in modules()]
    for name in [*JUSTIFIED_PICKLE, *JUSTIFIED_GETATTR]:
        assert name in paths, f"{name} is gone: correct the list"


def text_files():
    for path in tracked_files():
        try:
            yield path, (ROOT / path).read_text()
        except UnicodeDecodeError:
            continue


def test_no_package_index_is_named_anywhere():
    named = [
        str(path)
        for path, text in text_files()
        if (
            path.suffix in (".lock", ".toml", ".cfg", ".yaml", ".yml")
            or path.name == "Makefile"
            or "requirements" in path.name
        )
        and INDEX_OPTION.search(text)
    ]
    assert not named, f"an index address stands in {named}"


def test_the_lock_pins_every_requirement_with_hashes():
    entries = re.split(r"\n(?=\S)", (ROOT / LOCK).read_text().strip())
    assert len(entries) > 100
    assert not [e.split("\n")[0] for e in entries if "==" not in e or "--hash=sha256:" not in e]


def test_no_path_of_one_machine_stands_in_the_tree():
    found = [
        f"{path}: {match.group(0)}"
        for path, text in text_files()
        for match in HOME_PATH.finditer(text)
        if not text[match.start() :].startswith(ALLOWED_HOME_PATHS)
    ]
    assert not found


def test_no_large_file_is_tracked():
    sizes = {str(path): (ROOT / path).stat().st_size for path in tracked_files()}
    assert not {name: size for name, size in sizes.items() if size > 1_000_000}
    fixtures = sum(size for name, size in sizes.items() if name.startswith("tests/fixtures/"))
    assert fixtures < 2_000_000, f"tests/fixtures holds {fixtures} bytes"
