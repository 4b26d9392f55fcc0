"""A line of steps over windows: in one go, one window at a time; or step by step, with a spool on disk in between.

Both give the same, since a step is a function of one window. In one go, the networks of all steps are in memory;
step by step, only those of one.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pipelines.errors import EnvironmentFailed

Arrays = dict[str, np.ndarray]
"""What is known of one window after a step, by name."""
Step = Callable[[int, Arrays], Arrays]
"""Index of a window and what the step before says of it (nothing, for the first) -> what this one says of it."""


@dataclass(frozen=True, kw_only=True)
class LineStep:
    """A step that is not loaded yet; its networks live as long as the block."""

    name: str
    load: Callable[[], AbstractContextManager[Step]]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Is told how a line gets on."""

    progress: Callable[[str, int, int], None]
    """Name of a step, windows done, windows in all."""
    begins: Callable[[str], None]
    """Name of a step, or of several that are loaded together, before their networks are loaded."""
    ended: Callable[[str], None]
    """The same name, while its networks are still there."""


def run_line(steps: Sequence[LineStep], num_windows: int, watch: Watch) -> Iterator[Arrays]:
    """What the last step says of each window; a window is worked on only when it is asked for."""
    name = ", ".join(step.name for step in steps)
    watch.begins(name)
    with ExitStack() as stack:
        loaded = [stack.enter_context(step.load()) for step in steps]
        for index in range(num_windows):
            arrays: Arrays = {}
            for step in loaded:
                arrays = _in_c_order(step(index, arrays))
            watch.progress(steps[-1].name, index + 1, num_windows)
            yield arrays
        watch.ended(name)


def run_line_offloaded(steps: Sequence[LineStep], num_windows: int, spool: Path, watch: Watch) -> Iterator[Arrays]:
    """The same as `run_line`, each step for all windows before the next one is loaded.

    `spool` is an empty folder for what is between two steps, which grows with the number of windows.

    Raises:
        EnvironmentFailed: the spool cannot be written or read.
    """
    *first, last = steps
    before: str | None = None
    for step in first:
        for index, arrays in enumerate(_offloaded(step, num_windows, spool, before, watch)):
            _put(spool, step.name, index, arrays)
        before = step.name
    yield from _offloaded(last, num_windows, spool, before, watch)


def _offloaded(step: LineStep, num_windows: int, spool: Path, before: str | None, watch: Watch) -> Iterator[Arrays]:
    watch.begins(step.name)
    yield from _loaded_windows(step, num_windows, spool, before, watch)
    # Only now, outside of the function that held the networks, are they free.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _loaded_windows(
    step: LineStep, num_windows: int, spool: Path, before: str | None, watch: Watch
) -> Iterator[Arrays]:
    with step.load() as apply:
        for index in range(num_windows):
            arrays = _in_c_order(apply(index, {} if before is None else _take(spool, before, index)))
            watch.progress(step.name, index + 1, num_windows)
            yield arrays
        watch.ended(step.name)


def _in_c_order(arrays: Arrays) -> Arrays:
    """As the spool gives them back: the order of a sum, and so its last bits, may depend on the layout in memory."""
    return {name: np.asarray(array, order="C") for name, array in arrays.items()}


def _file(spool: Path, name: str, index: int) -> Path:
    return spool / f"{name}-{index:06d}.safetensors"


def _put(spool: Path, name: str, index: int, arrays: Arrays) -> None:
    path = _file(spool, name, index)
    try:
        save_file(arrays, path)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFailed(
            f"cannot write {path}: {error}; free the disk and run the same command again"
        ) from error


def _take(spool: Path, name: str, index: int) -> Arrays:
    """What was put, which is then gone from the disk."""
    path = _file(spool, name, index)
    try:
        arrays = load_file(path)
        path.unlink()
    except (OSError, SafetensorError) as error:
        raise EnvironmentFailed(f"cannot read {path}: {error}; run the same command again") from error
    return arrays
