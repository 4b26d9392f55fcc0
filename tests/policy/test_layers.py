"""models < pipelines < jobs, and every third-party engine in its place."""

from pathlib import Path

import pytest

from tests.policy.sources import LAYERS, imported_names, modules

FORBIDDEN_IN_MODELS = ("ray", "mlflow", "deepspeed", "pyarrow", "av", "tyro", "torch.distributed")
PLACES = {
    "deepspeed": ("pipelines/training/",),
    "ray.train": ("pipelines/training/",),
    "ray.data": ("pipelines/data/", "pipelines/cluster.py"),
    "mlflow": ("pipelines/tracking_ship.py",),
    "av": ("pipelines/data/media", "pipelines/data/decode_child.py"),
    "tyro": ("jobs/cli.py",),
}
"""Where a library may be imported: path prefixes; tests and benchmarks may import anything."""


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", modules(*LAYERS), ids=str)
def test_no_module_imports_a_layer_above_its_own(path: Path):
    own = LAYERS.index(path.parts[0])
    upward = [
        (name, line) for name, line in imported_names(path) if any(is_below(name, up) for up in LAYERS[own + 1 :])
    ]
    tests = [(name, line) for name, line in imported_names(path) if is_below(name, "tests")]
    assert not upward + tests, f"{path} imports upward: {upward + tests}"


@pytest.mark.parametrize("path", modules("models"), ids=str)
def test_models_are_pure_torch(path: Path):
    outside = [(n, line) for n, line in imported_names(path) if any(is_below(n, bad) for bad in FORBIDDEN_IN_MODELS)]
    assert not outside, f"{path} is not pure torch: {outside}"


@pytest.mark.parametrize("path", modules("pipelines", "jobs"), ids=str)
def test_engines_are_imported_only_in_their_place(path: Path):
    strays = [
        (name, line)
        for name, line in imported_names(path)
        for library, places in PLACES.items()
        if is_below(name, library) and not str(path).startswith(places)
    ]
    assert not strays, f"{path}: {strays}; see PLACES in this test"


def test_no_place_is_named_that_is_not_there():
    paths = [str(path) for path in modules()]
    for places in PLACES.values():
        for place in places:
            assert any(path.startswith(place) for path in paths), f"{place} is gone: correct PLACES"
