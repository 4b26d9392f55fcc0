"""The body of test_submitted_training; see `tests.own_process`."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 60, 5
LIMIT_S = 240.0


def main(folder: Path) -> dict[str, Any]:
    """Submit a training to a cluster, SIGKILL all of that in the middle, and submit the same to another one."""
    from tests.feature_factory import write_features

    features = write_features(folder / "features", {"train": 40, "val": 8})
    out = folder / "out"
    for name in ("jobs", "models", "pipelines"):
        shutil.copytree(ROOT / name, folder / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    job, ours = _submit(folder, _start_head(), features, out)
    _wait_for_checkpoint(job, out, folder / "job.log")
    killed = _kill([pid for pid in ours() if pid != job.pid])
    first_exit = job.wait(timeout=LIMIT_S)
    was_complete = (out / "manifest.json").exists()
    job, ours = _submit(folder, _start_head(), features, out)
    second_exit = job.wait(timeout=LIMIT_S)
    _kill(ours())
    _train_quietly(features, folder / "quiet")
    return {"killed": killed, "first_exit": first_exit, "was_complete": was_complete, "second_exit": second_exit}


def _start_head() -> str:
    """A head of two CPUs with a dashboard, which takes jobs; returns the dashboard's address."""
    from ray.cluster_utils import Cluster

    for attempts_left in (2, 1, 0):
        # Ray's own choice, the same for every cluster of a machine, would be another one's.
        port, agent_port = _free_ports(2)
        try:
            node: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 200_000_000, "include_dashboard": True}
            ports: dict[str, Any] = {"dashboard_port": port, "dashboard_agent_listen_port": agent_port}
            Cluster().add_node(**node, **ports, dashboard_host="127.0.0.1")
        except Exception:
            # A busy machine does not start Ray's agent in the seconds that Ray allows it.
            if not attempts_left:
                raise
        else:
            return f"http://127.0.0.1:{port}"
    raise RuntimeError("no attempt was made")


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _submit(folder: Path, address: str, features: Path, out: Path) -> tuple[subprocess.Popen[bytes], Any]:
    from tests.faults.kill_storm import descendants

    flags = ["--size", "tiny", "--features", str(features), "--num-workers", "2", "--steps", str(STEPS)]
    flags += ["--batch-size", "8", "--lr", "1e-3", "--warmup-steps", "2", "--schedule", "cosine", "--ema-width", "None"]
    flags += ["--weight-decay", "0", "--checkpoint-every", str(EVERY), "--out", str(out)]
    entry = [sys.executable, "jobs/train_mmdit.py", *flags]
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address]
    command = [*submit, "--working-dir", str(folder / "code"), "--", *entry]
    told, deadline = folder / "job.log", time.monotonic() + LIMIT_S
    while True:
        before = told.stat().st_size if told.exists() else 0
        with told.open("ab") as log:
            job = subprocess.Popen(command, stdout=log, stderr=log)
        while job.poll() is None and b"submitted successfully" not in told.read_bytes()[before:]:
            time.sleep(0.1)
        # A head that has just started refuses until its agent is there.
        if job.poll() is None or b"No available agent" not in told.read_bytes()[before:] or time.monotonic() > deadline:
            return job, lambda: [pid for pid, _ in descendants(os.getpid())]


def _kill(pids: list[int]) -> int:
    """SIGKILL them all; returns how many there were."""
    landed = 0
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            landed += 1
        except ProcessLookupError:
            continue
    return landed


def _wait_for_checkpoint(job: subprocess.Popen[bytes], out: Path, log: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not list(out.glob("checkpoints/*/COMPLETE")):
        if job.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no checkpoint; the job's exit: {job.poll()}: {log.read_text()[-3000:]}")
        time.sleep(0.02)


def _train_quietly(features: Path, out: Path) -> None:
    """The same training by two processes, without Ray, jobs and stages."""
    from pipelines.training.flow_matching_objective import FlowMatchingObjective, fit_starting_policy
    from pipelines.training.loop import TrainingOrder
    from pipelines.training.options import TrainingOptions
    from tests.training_worlds import train_together

    out.mkdir()
    fit_starting_policy("tiny", 0, str(features), "train", out / "start")
    objective = FlowMatchingObjective(
        start=str(out / "start"), features=str(features), size="tiny", train_split="train", val_split="val"
    )
    options = TrainingOptions(
        steps=STEPS, batch_size=8, lr=1e-3, warmup_steps=2, schedule="cosine", checkpoint_every=EVERY
    )
    train_together([TrainingOrder(objective, options, str(out))], 2, out / "meeting")


if __name__ == "__main__":
    found = main(Path(sys.argv[1]))
    Path(sys.argv[1], "found.json").write_text(json.dumps(found))
