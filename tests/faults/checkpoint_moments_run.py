"""The body of test_checkpoint_moments: trainings by two processes whose checkpoints are hit.

In a process of its own that forks the ranks, so that torch and DeepSpeed are imported once for all of them. No Ray.
"""

import dataclasses
import errno
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pipelines.data.storage import Folder
from pipelines.errors import PipelineError
from pipelines.training import checkpoints
from pipelines.training.fragments import HostCopy
from pipelines.training.loop import CHECKPOINTS, TrainingOrder, train
from pipelines.training.options import TrainingOptions
from pipelines.training.world import World
from tests.toy_objective import ToyObjective

OPTIONS = TrainingOptions(steps=12, batch_size=8, lr=3e-2, clip=0.05, ema_decay=0.9, zero_stage=1, checkpoint_every=3)
RANKS = 2
KILLS = {
    "half_a_file": 1,
    "before_the_receipt": 0,
    "before_complete": 0,
    "while_old_ones_go": 0,
}
"""Moments of the second checkpoint, that of step 6, and the rank that is killed in it."""


def main(folder: Path, features: str, poison: list[str]) -> dict[str, Any]:
    """A quiet training; one for every kill and one without space, with their ends; a rollback by two and by one."""
    found: dict[str, Any] = {}
    toy = ToyObjective(features=features)
    # One old checkpoint, so that there is one to delete.
    order = TrainingOrder(toy, dataclasses.replace(OPTIONS, keep_last=1), str(folder / "quiet"))
    found["quiet"] = _train(order, folder / "quiet_meeting")
    for moment, rank in [*KILLS.items(), ("no_space", 1)]:
        hit = dataclasses.replace(order, out=str(folder / moment))
        told = _train(
            hit, folder / f"{moment}_meeting", lambda mine, m=moment, r=rank: arrange(m) if mine == r else None
        )
        newest, _ = checkpoints.newest_complete(Path(hit.out) / CHECKPOINTS)
        step = None if newest is None else newest.step
        found[moment] = {"told": told, "step": step, "then": _train(hit, folder / f"{moment}_again")}
    bad = ToyObjective(features=features, poison=tuple(poison))
    options = dataclasses.replace(OPTIONS, max_bad_steps=2)
    for name, ranks in (("rollback", RANKS), ("rollback_alone", 1)):
        order = TrainingOrder(bad, options, str(folder / name))
        found[name] = _train(order, folder / f"{name}_meeting", ranks=ranks)
    return found


def arrange(moment: str) -> None:
    """Let something happen to this process at a moment of its second checkpoint."""
    calls = itertools.count(1)

    def is_time() -> bool:
        return next(calls) == 2

    def before(place: Any, name: str, strike: Callable[..., None]) -> None:
        real = vars(place)[name]

        def call(*values: Any, **named: Any) -> Any:
            if is_time():
                strike(*values)
            return real(*values, **named)

        mock.patch.object(place, name, call).start()

    def write_half(copy: HostCopy, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(5000))
        die()

    def delete_some(root: Folder, *_: Any) -> None:
        oldest = min(root.local_path().glob("step_*"))
        next(oldest.glob("*.safetensors")).unlink()
        die()

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    {
        "half_a_file": lambda: before(HostCopy, "write", write_half),
        "before_the_receipt": lambda: before(checkpoints, "publish_receipt", die),
        "before_complete": lambda: before(checkpoints, "publish", die),
        "while_old_ones_go": lambda: before(checkpoints, "retain", delete_some),
        "no_space": lambda: before(HostCopy, "write", refuse),
    }[moment]()


def die(*_: Any) -> None:
    """SIGKILL this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def _train(
    order: TrainingOrder, meeting: Path, prepare: Callable[[int], None] = lambda rank: None, *, ranks: int = RANKS
) -> list[str]:
    """Train by so many forked processes; returns what each says: its notes, its error, or "killed"."""
    Path(order.out).mkdir(exist_ok=True)
    pids: list[int] = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _be_rank(order, meeting, prepare, rank, ranks)
        pids.append(pid)
    told = [""] * ranks
    while "" in told:
        for rank, pid in enumerate(pids):
            if told[rank]:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                said = meeting.with_suffix(f".{rank}")
                told[rank] = "killed" if os.WIFSIGNALED(status) else said.read_text()
                if os.WIFSIGNALED(status):
                    # As Ray does with the group of a dead rank.
                    for other in (p for r, p in enumerate(pids) if not told[r]):
                        os.kill(other, signal.SIGKILL)
        time.sleep(0.02)
    return told


def _be_rank(order: TrainingOrder, meeting: Path, prepare: Callable[[int], None], rank: int, ranks: int) -> None:
    said = "a defect"
    try:
        os.environ["LOCAL_RANK"] = str(rank)
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(str(meeting), ranks), rank=rank, world_size=ranks)
        prepare(rank)
        try:
            result = train(order, World(rank, ranks, torch.device("cpu")), lambda step, metrics: None)
            said = "done" if result is None else "; ".join(["done", *result.notes])
        except PipelineError as error:
            said = f"exit {error.exit_code}: {error}"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    finally:
        meeting.with_suffix(f".{rank}").write_text(said)
        os._exit(0)


if __name__ == "__main__":
    # What DeepSpeed and torch import late, once, before the ranks are forked.
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import torch._dynamo

    found = main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    Path(sys.argv[1], "found.json").write_text(json.dumps(found))
