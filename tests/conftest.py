"""Shared fixtures: one local Ray cluster for the whole run, and no network or user-wide state."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local cluster of 2 CPUs on loopback, shared by every test that asks for it."""
    from pipelines.cluster import connect

    with connect(num_cpus=2):
        yield


@pytest.fixture(scope="session", autouse=True)
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A launch around all tests and the jobs they start, whose runs nobody ships: MLflow is met where it is tested."""
    from pipelines.tracking import LAUNCH_VARIABLE, LaunchReference

    folder = tmp_path_factory.mktemp("launch")
    reference = LaunchReference(journal_id="tests", folder=str(folder), store="sqlite:///unused.db").to_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LAUNCH_VARIABLE, reference)
        yield reference


@pytest.fixture(autouse=True)
def scheduling() -> Iterator[None]:
    """No test leaves this process with another scheduling: see `tests.own_scheduling`."""
    before = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == before


@pytest.fixture
def fixtures() -> Path:
    """Folder of the small committed fixtures."""
    return Path(__file__).parent / "fixtures"
