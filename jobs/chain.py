"""A launch of many jobs in a row, as the commands a person would give: what `demo` and `science` run.

Every step is the job of that name with a preset and flags, and its command is printed, so that each can be given by
hand. A step whose folder has its manifest is not run again, so a launch that was killed goes on where it was.
"""

import importlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs import cli

if TYPE_CHECKING:
    from pipelines.training.workers import WorkerGroup

SECONDS = "seconds.json"
IN_THE_GROUP = ("train_mmdit", "degrade", "train_sf_cavp", "rpo_rounds", "evaluate")
"""Jobs that work in the launch's warm workers; the others read and write media, on Ray Data or in this process."""


@dataclass(frozen=True)
class Step:
    """One stage of a launch: a job with its flags, and the folder whose manifest says that it is done."""

    name: str
    job: str
    flags: tuple[str, ...]
    done: str

    @property
    def is_done(self) -> bool:
        """Whether its artifact is finished."""
        from pipelines.data.store import is_finished

        return is_finished(self.done)


def parse_all(steps: Sequence[Step], preset: str) -> None:
    """Parse the flags of every step and run nothing: a wrong one is told before hours of work; raises InputError."""
    for step in steps:
        cli.parse(step.job, importlib.import_module(f"jobs.{step.job}").Options, [preset, *step.flags])


def run_all(steps: Sequence[Step], *, out: str, preset: str, num_workers: int) -> None:
    """Run what is not done yet, in one warm group of workers; leaves this process with the first exit code above 0.

    `seconds.json` in `out` says how long each step took; nothing of one that was cut, whose seconds nobody knows.
    """
    from pipelines.cluster import connect
    from pipelines.training.workers import IDLE_CPUS, warm_workers

    if all(step.is_done for step in steps):
        return
    warm = warm_workers(num_workers, cpus_per_worker=IDLE_CPUS)
    with connect(num_cpus=num_workers), warm as group:
        for step in steps:
            _run(step, out, preset, group)


def seconds_of(out: str) -> dict[str, float]:
    """Wall seconds by step of the launch at `out`, of those that ran from start to end in one attempt."""
    return {name: seconds for name, seconds in _begun(out).items() if seconds is not None}


def _begun(out: str) -> dict[str, float | None]:
    """Wall seconds of every step that was begun; None while it is at work, and for good if that attempt was cut."""
    from pipelines.data.storage import open_folder

    folder = open_folder(out)
    return json.loads(folder.read_bytes(SECONDS)) if folder.exists(SECONDS) else {}


def _note(out: str, name: str, seconds: float | None) -> None:
    from pipelines.data.storage import open_folder

    text = json.dumps(_begun(out) | {name: seconds}, indent=1) + "\n"
    open_folder(out).write_bytes(SECONDS, text.encode())


def _run(step: Step, out: str, preset: str, group: "WorkerGroup") -> None:
    command = [preset, *step.flags]
    print(f"\n$ python jobs/{step.job}.py {shlex.join(command)}", flush=True)
    begun = step.is_done or step.name in _begun(out)
    if not begun:
        _note(out, step.name, None)
    module: Any = importlib.import_module(f"jobs.{step.job}")
    started = time.monotonic()
    parsed = cli.parse(step.job, module.Options, command)
    run: Callable[..., int] = module.main
    code = run(parsed, group) if step.job in IN_THE_GROUP else run(parsed)
    if code:
        sys.exit(code)
    if not begun:
        _note(out, step.name, round(time.monotonic() - started, 1))
