"""Random SIGKILLs over a training of two Ray workers: `python -m tests.faults.kill_training` (make kill-training).

A training runs quietly, then again while its ranks, its driver and its raylet are killed at random moments; whenever
the driver is gone the same command is given again. It fails when the weights or the journal are not those of the quiet
run bit for bit, when an exit is one that no kill explains, or when a kill costs more steps than it may.

What a kill may cost: a checkpoint is written beside the steps of the next interval and is waited for at its end, so the
newest whole one is at most two intervals old: the interval under way, and the one whose checkpoint is in flight.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.table import machine
from pipelines.data.store import MANIFEST
from pipelines.tracking import LAUNCH_VARIABLE, LaunchReference
from pipelines.training import checkpoints
from pipelines.training.journal import read_journal
from pipelines.training.loop import CHECKPOINTS
from pipelines.training.workers import DEFAULT_MAX_FAILURES
from pipelines.training.workplace import JOURNAL
from tests.faults.kill_storm import descendants
from tests.feature_factory import write_features

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "network.safetensors"
VICTIMS = ("rank", "rank", "rank", "driver", "raylet")
"""What is killed, one drawn for each strike."""
MARKS = {"rank": "ray::RayTrainWorker", "raylet": "raylet/raylet"}
IN_RESTART, RESTART_S = 0.3, 25.0
"""Share of the strikes that do not wait for a new step, and the latest moment of such a one after the strike before."""
CHECKPOINT_EVERY = 5
STEPS_PER_KILL = 6 * CHECKPOINT_EVERY
"""More than the kills wait for, and than orphaned ranks take before they end."""
POLL_S = 0.01
PATIENCE_S = 600.0
"""Longest time without a new step or an exit."""
FATAL = ("driver", "raylet")


@dataclass
class Strike:
    """One kill and what followed."""

    victim: str
    in_restart: bool
    """It came before the first new step after the strike before it."""
    step: int
    """Furthest step that the journal had when the victim was killed."""
    furthest: int | None = None
    """Furthest step when the next attempt began: ranks outlive their driver or raylet by a moment, and train on."""
    resumed_from: int | None = None
    """Step of the checkpoint that the next attempt began with; None where the next strike came first."""
    new_step_s: float | None = None
    """From the kill to the first step that no attempt before had taken; None where the next strike came first."""

    @property
    def lost_steps(self) -> int | None:
        """Steps that had to be taken again."""
        return None if self.resumed_from is None or self.furthest is None else self.furthest - self.resumed_from


@dataclass
class Storm:
    """The run under fire, as its folder and its processes show it."""

    command: list[str]
    out: Path
    log: Path
    rng: random.Random
    strikes: list[Strike] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    furthest: int = 0
    journal_read: tuple[int, int] | None = None
    """File and size of the journal when it was last read."""

    def run(self, kills: int) -> None:
        """Train to the end under so many kills; raises AssertionError for an exit that none of them explains."""
        self._start()
        for _ in range(kills):
            in_restart = bool(self.strikes) and self.rng.random() < IN_RESTART
            if in_restart:
                self._watch_for(self.rng.uniform(0, RESTART_S))
            else:
                self._watch_until(self.rng.randint(1, 2 * CHECKPOINT_EVERY))
                self._watch_for(self.rng.uniform(0, 0.2))
            self._strike(in_restart)
        self._watch_until(None)
        assert self.driver.returncode == 0, f"exit {self.driver.returncode} at the end: {_end(self.log)}"

    def _start(self) -> None:
        self.driver, self.fatal, self.lost_ranks = start(self.command, self.log), False, 0

    def _strike(self, in_restart: bool) -> None:
        below = list(descendants(self.driver.pid))
        alive = {kind: [pid for pid, arguments in below if mark in arguments] for kind, mark in MARKS.items()}
        alive["driver"] = [self.driver.pid]
        kind = self.rng.choice([victim for victim in VICTIMS if alive[victim]])
        victim = self.rng.choice(alive[kind])
        self._look()
        self.strikes.append(Strike(kind, in_restart and self.strikes[-1].new_step_s is None, self.furthest))
        self.struck_s = time.monotonic()
        self.journal_file = self._journal_id()
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            # A restart in progress ended it first: the driver is always there.
            self.strikes[-1].victim = kind = "driver"
            self.driver.kill()
        self.fatal |= kind in FATAL
        self.lost_ranks += kind == "rank"

    def _watch_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._look()
            time.sleep(POLL_S)

    def _watch_until(self, new_steps: int | None) -> None:
        """Until the run is past its last kill by so many new steps; None: until the training is done."""
        seen, moved = (self.furthest, len(self.exits)), time.monotonic()
        while self.driver.poll() is None or not (self.out / MANIFEST).exists():
            if new_steps is not None and self._new_steps() >= new_steps:
                return
            self._look()
            if seen != (self.furthest, len(self.exits)):
                seen, moved = (self.furthest, len(self.exits)), time.monotonic()
            assert time.monotonic() - moved < PATIENCE_S, f"nothing for {PATIENCE_S:g} s: {_end(self.log)}"
            time.sleep(POLL_S)
        assert new_steps is None, "the training ended before all kills had landed"

    def _new_steps(self) -> int:
        """Steps that the attempt after the last kill has taken and none before it had."""
        began = self.strikes[-1].furthest if self.strikes else 0
        return 0 if began is None else self.furthest - began

    def _look(self) -> None:
        """Take in the journal, and give the command again where the driver is gone."""
        code = self.driver.poll()
        if code is not None and not (self.out / MANIFEST).exists():
            self.exits.append(code)
            worn_out = code == 3 and self.lost_ranks > DEFAULT_MAX_FAILURES
            # A machine too busy to start Ray: the same command again, as the line says.
            not_started = code == 3 and "did not come up" in _end(self.log).splitlines()[-1]
            assert self.fatal or worn_out or not_started, f"exit {code} that no kill explains: {_end(self.log)}"
            self._start()
        strike = self.strikes[-1] if self.strikes else None
        if strike is not None and strike.resumed_from is None and self._journal_id() != self.journal_file:
            # The journal has just been cut back to the checkpoint, the next one is some steps away.
            found, _ = checkpoints.newest_complete(self.out / CHECKPOINTS)
            strike.furthest, strike.resumed_from = self.furthest, 0 if found is None else found.step
        last = self._last_step()
        if last > self.furthest:
            self.furthest = last
            if strike is not None and strike.furthest is not None and strike.new_step_s is None:
                strike.new_step_s = time.monotonic() - self.struck_s

    def _last_step(self) -> int:
        """Last step in the journal, which is read only where it has changed: a hundred looks a second cost a core."""
        try:
            status = (self.out / JOURNAL).stat()
        except FileNotFoundError:
            return 0
        if (status.st_ino, status.st_size) == self.journal_read:
            return self.furthest
        self.journal_read = status.st_ino, status.st_size
        records = read_journal(self.out / JOURNAL)
        return int(records[-1]["step"] or 0) if records else 0

    def _journal_id(self) -> int | None:
        try:
            return (self.out / JOURNAL).stat().st_ino
        except FileNotFoundError:
            return None


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The command under test, in a session of its own."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True
        )


def command_for(features: Path, out: Path, steps: int) -> list[str]:
    """Train the tiny policy with two workers."""
    flags = ["--size", "tiny", "--features", str(features), "--num-workers", "2", "--steps", str(steps)]
    flags += ["--batch-size", "8", "--lr", "1e-3", "--warmup-steps", "2", "--ema-width", "None", "--ema-decay", "0.9"]
    flags += ["--checkpoint-every", str(CHECKPOINT_EVERY), "--out", str(out)]
    return [sys.executable, str(ROOT / "jobs" / "train_mmdit.py"), *flags]


def storm_and_compare(folder: Path, *, kills: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """A quiet run and one under fire; returns what was seen, and what is wrong with it."""
    features = write_features(folder / "features", {"train": 40, "val": 8})
    steps = kills * STEPS_PER_KILL
    quiet, out = folder / "quiet", folder / "storm"
    assert start(command_for(features, quiet, steps), folder / "quiet.log").wait() == 0, _end(folder / "quiet.log")
    storm = Storm(command_for(features, out, steps), out, folder / "storm.log", random.Random(seed))
    storm.run(kills)
    faults = []
    if _sha256(out / WEIGHTS) != _sha256(quiet / WEIGHTS):
        faults.append("the weights are others than the quiet run's")
    if _journal(out) != _journal(quiet):
        faults.append("the journal's steps and losses are others than the quiet run's")
    lost = [strike.lost_steps for strike in storm.strikes if strike.lost_steps is not None]
    if max(lost) > 2 * CHECKPOINT_EVERY:
        faults.append(f"a kill cost {max(lost)} steps, more than two intervals of {CHECKPOINT_EVERY}")
    return {**_summary(storm, steps, seed), "sha256": _sha256(out / WEIGHTS), "faults": faults}, faults


def _summary(storm: Storm, steps: int, seed: int) -> dict[str, Any]:
    seconds = [strike.new_step_s for strike in storm.strikes if strike.new_step_s is not None]
    lost = [strike.lost_steps for strike in storm.strikes if strike.lost_steps is not None]
    return {
        "title": "kill_training",
        "machine": machine(),
        "seed": seed,
        "kills": len(storm.strikes),
        "victims": dict(Counter(strike.victim for strike in storm.strikes)),
        "in a restart": sum(strike.in_restart for strike in storm.strikes),
        "steps": steps,
        "checkpoint_every": CHECKPOINT_EVERY,
        "lost steps, median": statistics.median(lost),
        "lost steps, most": max(lost),
        "kills that cost more than one interval": sum(n > CHECKPOINT_EVERY for n in lost),
        "seconds to a new step, median": round(statistics.median(seconds), 1),
        "seconds to a new step, most": round(max(seconds), 1),
        "exits": storm.exits,
        "strikes": [asdict(strike) for strike in storm.strikes],
    }


def _journal(out: Path) -> list[tuple[object, object]]:
    return [(record["step"], record["loss"]) for record in read_journal(out / JOURNAL)]


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    """Print what was killed and what it cost; 1 when something is not as in the quiet run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-training-") as scratch:
        folder = Path(scratch)
        # The runs are of no interest to MLflow.
        (folder / "launch").mkdir()
        reference = LaunchReference(
            journal_id="storm", folder=str(folder / "launch"), store=f"sqlite:///{folder}/unused.db"
        )
        os.environ[LAUNCH_VARIABLE] = reference.to_text()
        found, faults = storm_and_compare(folder, kills=options.kills, seed=options.seed)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shown = {name: value for name, value in found.items() if name not in ("strikes", "faults")}
    sys.stdout.write("".join(f"{name}: {value}\n" for name, value in shown.items()))
    sys.stdout.write("".join(f"FAILED: {fault}\n" for fault in faults) or "equal to the quiet run\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
