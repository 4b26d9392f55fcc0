"""A storm of SIGKILLs over preprocess: `python -m tests.faults.kill_storm` (make kill-storm).

A corpus is preprocessed quietly, then again while drivers, raylets, actors, their decode children and their watchers
are killed at random moments; whenever the driver is gone the same command is given again. It fails when a digest or a
count differs, when an exit is anything but a kill's, or when fewer kills than asked landed while rows were outstanding.
"""

import argparse
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.data.commits import done_units
from pipelines.data.contracts import FEATURES
from pipelines.data.storage import open_folder
from pipelines.data.store import MANIFEST, Dataset
from tests.pipelines.clip_factory import simple_clip

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "rpo", "val", "test")
DISTINCT = 12
"""Different clips; the others are links to them under names of their own."""
VICTIMS = ("actor", "child", "driver", "actor", "child", "watcher", "raylet", "actor", "child", "child")
"""What is killed, in turn from a random place."""
MARKS = {
    "raylet": "raylet/raylet",
    "actor": "_CommittingActor",
    "child": "pipelines.data.decode_child",
    "watcher": "pipelines.data.stall_watch",
}
PAUSE_S = (0.3, 2.5)
MAX_SECONDS = 1500.0


@dataclass
class Storm:
    """What was killed, and how the drivers ended."""

    landed: Counter[str] = field(default_factory=Counter)
    exits: list[int] = field(default_factory=list)


def make_corpus(folder: Path, clips: int) -> Path:
    """A manifest of `clips` good files and a bad one a split."""
    folder.mkdir(parents=True)
    originals = [simple_clip(folder / f"original{i}.mp4", 2.5 + 0.25 * (i % 2)) for i in range(DISTINCT)]
    lines = ["video,split"]
    for index in range(clips):
        name = f"clip{index:05d}.mp4"
        os.link(originals[index % DISTINCT], folder / name)
        lines.append(f"{name},{SPLITS[index % len(SPLITS)]}")
    for split in SPLITS:
        (folder / f"bad_{split}.mp4").write_bytes(b"this is no video")
        lines.append(f"bad_{split}.mp4,{split}")
    path = folder / "clips.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def start(manifest: Path, out: Path, workers: int, log: Path) -> subprocess.Popen[bytes]:
    """The command under test, in a session of its own."""
    flags = ["--manifest", str(manifest), "--out", str(out), "--num-workers", str(workers), "--max-reject-rate", "0.5"]
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "preprocess.py"), "tiny", *flags],
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """(pid, command line) of every process below `pid`; those that end meanwhile are passed over."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[tuple[int, str]]] = {}
    for line in listed.splitlines():
        number, parent, arguments = line.split(None, 2)
        children.setdefault(int(parent), []).append((int(number), arguments))
    waiting = [pid]
    while waiting:
        for number, arguments in children.get(waiting.pop(), ()):
            waiting.append(number)
            yield number, arguments


def candidates(driver: subprocess.Popen[bytes]) -> dict[str, list[int]]:
    """Process ids of what can be killed now, by kind; nothing before all kinds are there, so that clips are decoded."""
    below = list(descendants(driver.pid))
    found = {kind: [pid for pid, arguments in below if mark in arguments] for kind, mark in MARKS.items()}
    return {"driver": [driver.pid], **found} if all(found.values()) else {}


def run_storm(manifest: Path, out: Path, *, kills: int, seed: int, units: int) -> Storm:
    """Preprocess while killing; returns when the dataset is finished.

    Raises:
        AssertionError: a driver ended in a way that no kill explains, or the storm took too long.
    """
    rng, storm = random.Random(seed), Storm()
    turn = itertools.cycle(VICTIMS)
    for _ in range(rng.randrange(len(VICTIMS))):
        next(turn)
    deadline = time.monotonic() + MAX_SECONDS
    log = out.with_suffix(".log")
    driver = start(manifest, out, 2, log)
    fatal = False
    while not (out / MANIFEST).exists() or driver.poll() is None:
        assert time.monotonic() < deadline, f"not finished after {MAX_SECONDS:g} s; see {log}"
        if driver.poll() is not None:
            storm.exits.append(driver.returncode)
            assert fatal or driver.returncode == 0, f"exit {driver.returncode} without a kill; see {log}"
            driver, fatal = start(manifest, out, 2, log), False
        time.sleep(rng.uniform(*PAUSE_S))
        alive = candidates(driver)
        if not alive or storm.landed.total() >= kills:
            continue
        kind = next(turn)
        if len(done_units(open_folder(out))) < units and not (out / MANIFEST).exists():
            os.kill(rng.choice(alive[kind]), signal.SIGKILL)
            storm.landed[kind] += 1
            fatal = fatal or kind in ("driver", "raylet")
    storm.exits.append(driver.wait())
    return storm


def main() -> int:
    """Print both digests and what was killed; 1 when they differ or too few kills landed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--kills", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-storm-") as scratch:
        folder = Path(scratch)
        return storm_and_compare(folder, clips=options.clips, kills=options.kills, seed=options.seed)


def storm_and_compare(folder: Path, *, clips: int, kills: int, seed: int) -> int:
    """A quiet run and a storm of the same corpus; 0 when they agree and enough kills landed."""
    manifest = make_corpus(folder / "corpus", clips)
    quiet_out, storm_out = folder / "quiet", folder / "storm"
    assert start(manifest, quiet_out, 2, folder / "quiet.log").wait() == 0, (folder / "quiet.log").read_text()[-3000:]
    quiet = Dataset.open(str(quiet_out), FEATURES)
    units = len(quiet.manifest["parts"])
    storm = run_storm(manifest, storm_out, kills=kills, seed=seed, units=units)
    made = Dataset.open(str(storm_out), FEATURES)
    killed = ", ".join(f"{count} {kind}" for kind, count in sorted(storm.landed.items()))
    sys.stdout.write(
        f"quiet  {quiet.digest}  {quiet.manifest['counts']}\n"
        f"storm  {made.digest}  {made.manifest['counts']}\n"
        f"killed while rows were outstanding: {storm.landed.total()} ({killed}); the command was given "
        f"{len(storm.exits)} times, exits {storm.exits}\n"
    )
    same = quiet.digest == made.digest and quiet.manifest["counts"] == made.manifest["counts"]
    if not same:
        sys.stdout.write("FAILED: the storm's dataset is another one\n")
    if storm.landed.total() < kills:
        sys.stdout.write(f"FAILED: {storm.landed.total()} kills landed, {kills} were asked; take more --clips\n")
    return 0 if same and storm.landed.total() >= kills else 1


if __name__ == "__main__":
    sys.exit(main())
