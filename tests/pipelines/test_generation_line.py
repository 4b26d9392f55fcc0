"""A line in one go and step by step: the same arrays, but another order of work and other networks in memory."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import EnvironmentFailed
from pipelines.generation_line import Arrays, LineStep, Step, Watch, run_line, run_line_offloaded


class Network:
    """Stands for what a step loads."""


class Log:
    """What happened, and how many networks were alive when something was loaded or done."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.most_alive = 0
        self.networks: list[weakref.ref[Network]] = []

    def watch(self) -> Watch:
        return Watch(
            progress=lambda name, done, total: self.lines.append(f"{name} {done}/{total}"),
            begins=lambda name: self.lines.append(f"begin {name}"),
            ended=lambda name: self.lines.append(f"end {name}"),
        )

    def step(self, name: str, work: Callable[[int, Arrays], Arrays]) -> LineStep:
        @contextmanager
        def load() -> Iterator[Step]:
            network = Network()
            self.networks.append(weakref.ref(network))
            self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.networks))

            def apply(index: int, arrays: Arrays) -> Arrays:
                assert network is not None
                self.lines.append(f"{name}{index}")
                return work(index, arrays)

            yield apply

        return LineStep(name=name, load=load)


def three_steps(log: Log) -> tuple[LineStep, ...]:
    def first(index: int, arrays: Arrays) -> Arrays:
        assert arrays == {}
        noise = np.random.default_rng(index).standard_normal((4, 5)).astype(np.float16)
        # Neither contiguous nor of one dtype, and one without dimensions.
        return {"a": noise.T, "b": np.arange(6, dtype=np.uint8)[::2], "c": np.array(float(index))}

    def second(index: int, arrays: Arrays) -> Arrays:
        assert float(arrays["c"]) == index
        return {"d": arrays["a"] * 2, "b": arrays["b"]}

    def third(index: int, arrays: Arrays) -> Arrays:
        return {"sum": arrays["d"].sum(axis=1) + arrays["b"].sum()}

    return log.step("x", first), log.step("y", second), log.step("z", third)


def test_both_ways_give_the_same_arrays_bit_for_bit(tmp_path: Path) -> None:
    together = list(run_line(three_steps(Log()), 4, Log().watch()))
    in_turn = list(run_line_offloaded(three_steps(Log()), 4, tmp_path, Log().watch()))
    assert len(together) == len(in_turn) == 4
    for one, other in zip(together, in_turn, strict=True):
        assert one["sum"].dtype == other["sum"].dtype
        assert np.array_equal(one["sum"], other["sum"])
    assert not np.array_equal(together[0]["sum"], together[1]["sum"])


def test_in_one_go_a_window_is_worked_on_when_it_is_asked_for() -> None:
    log = Log()
    line = run_line(three_steps(log), 3, log.watch())
    assert log.lines == []
    next(line)
    assert log.lines == ["begin x, y, z", "x0", "y0", "z0", "z 1/3"]
    next(line)
    assert log.lines[5:] == ["x1", "y1", "z1", "z 2/3"]
    assert log.most_alive == 3
    assert len(list(line)) == 1
    assert log.lines[-1] == "end x, y, z"


def test_step_by_step_only_one_step_is_loaded_and_the_spool_empties_itself(tmp_path: Path) -> None:
    log = Log()
    gc.collect()
    line = run_line_offloaded(three_steps(log), 2, tmp_path, log.watch())
    next(line)
    assert [word for word in log.lines if "/" not in word] == [
        *("begin x", "x0", "x1", "end x"),
        *("begin y", "y0", "y1", "end y"),
        *("begin z", "z0"),
    ]
    assert log.most_alive == 1
    assert [p.name for p in tmp_path.iterdir()] == ["y-000001.safetensors"]
    assert len(list(line)) == 1
    assert list(tmp_path.iterdir()) == []
    assert not any(ref() for ref in log.networks)


def test_a_line_that_is_left_early_lets_go_of_its_networks() -> None:
    log = Log()
    line = run_line(three_steps(log), 3, log.watch())
    next(line)
    del line
    gc.collect()
    assert not any(ref() for ref in log.networks)


def test_a_spool_that_is_gone_is_a_failure_of_the_environment(tmp_path: Path) -> None:
    line = run_line_offloaded(three_steps(Log()), 2, tmp_path / "absent", Log().watch())
    with pytest.raises(EnvironmentFailed, match=r"cannot write .*absent"):
        next(line)
    line = run_line_offloaded(three_steps(Log()), 2, tmp_path, Log().watch())
    next(line)
    (tmp_path / "y-000001.safetensors").write_bytes(b"cut")
    with pytest.raises(EnvironmentFailed, match="cannot read"):
        next(line)
