"""Fixtures of the tests of trainings."""

import pytest

from tests.feature_factory import write_features


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small features dataset to train on; modules that need another one have their own under this name."""
    return str(write_features(tmp_path_factory.mktemp("data") / "features", {"train": 40, "val": 16}))
