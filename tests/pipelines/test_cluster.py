"""Connecting to Ray: what keeps it from coming up is one line and exit code 3."""

import pytest
import ray

from pipelines.cluster import connect
from pipelines.errors import EnvironmentFailed


@pytest.fixture
def disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of a user's: no open connection, whatever the tests before this one left."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)


@pytest.mark.usefixtures("disconnected")
@pytest.mark.parametrize("address", [None, "127.0.0.1:1"])
def test_a_ray_that_does_not_come_up_is_one_line(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise Exception("The current node timed out during startup.\nand more")

    monkeypatch.setattr(ray, "init", init)
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(EnvironmentFailed, match="timed out during startup") as found, connect():
        pass
    assert "\n" not in str(found.value)
    assert found.value.exit_code == 3
    assert (address or "a local cluster") in str(found.value)


@pytest.mark.usefixtures("disconnected")
def test_an_error_of_the_work_inside_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(KeyError, match="inside"), connect():
        raise KeyError("inside")
