"""The fuzzer's command: `python -m tests.fuzz.media --files 10000 --seed 0`, or `--only INDEX --keep DIR` for one file.

Ends with 1 when preprocess lost a file, told of it twice, gave a reason outside the list, kept a row that breaks the
contract, met an exception that nobody foresaw, hung, or died. Files that cost a decode child are listed: that is
FFmpeg's fault and what the child is for.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.fuzz.mutators import UNTOUCHED_EVERY, make_mutant
from tests.fuzz.seeds import write_seeds
from tests.fuzz.worker import Batch, Call, Result, file_name, mutant_stem, serve

BATCH_FILES = 200
ALL_WINDOWS_EVERY = 4
"""One batch in so many is cut into all windows, so that headers are asked for lengths and windows are sought."""
START_SLACK_S = 20.0
"""A child has to start, and the machine may be busy, before a call counts as hung."""
SHOWN = 12


@dataclass(kw_only=True)
class Tally:
    """What a run found."""

    started_s: float = field(default_factory=time.monotonic)
    files: int = 0
    problems: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    details: list[tuple[str, str]] = field(default_factory=list)
    slowest: list[Call] = field(default_factory=list)
    calls: int = 0
    children_lost: int = 0
    child_peak_bytes: int = 0
    parent_peak_bytes: int = 0

    def add_call(self, call: Call, limit_s: float) -> None:
        """Take in one call of the decoder, which may not take longer than `limit_s`."""
        self.calls += 1
        self.children_lost += call.child_lost
        self.child_peak_bytes = max(self.child_peak_bytes, call.child_peak_bytes)
        self.slowest = sorted([*self.slowest, call], key=lambda c: -c.seconds)[:SHOWN]
        if call.seconds > limit_s:
            self.problems.append(f"{call.name}: {call.seconds:.1f} s, the limit is {limit_s:g} s")

    def add_result(self, result: Result, files: int) -> None:
        """Take in a finished batch."""
        self.files += files
        self.problems += result.problems
        self.reasons.update(result.reasons)
        self.details += result.details
        self.parent_peak_bytes = max(self.parent_peak_bytes, result.parent_peak_bytes)

    def lines(self) -> Iterator[str]:
        """The report."""
        yield f"{self.files} files, {self.calls} calls of the decoder, {time.monotonic() - self.started_s:.0f} s"
        yield from (f"  {count:7d}  {reason}" for reason, count in self.reasons.most_common())
        peaks = (f"{peak / 2**20:.0f} MiB" for peak in (self.child_peak_bytes, self.parent_peak_bytes))
        yield "peak memory: child {}, parent {}".format(*peaks)
        yield f"children lost: {self.children_lost}; files that cost one or timed out: {len(self.details)}"
        yield from (f"  {recipe}\n    {detail}" for recipe, detail in self.details)
        yield "slowest:"
        yield from (f"  {call.seconds:6.2f} s  {call.name}  {call.outcome[:100]}" for call in self.slowest)
        yield f"BREACHES: {len(self.problems)}" if self.problems else "no breach"
        yield from (f"  {problem}" for problem in self.problems)


def plan(indexes: Sequence[int], run_seed: int, folder: Path, timeout_s: float) -> list[Batch]:
    """Batches of mutants; how a mutant is cut into windows follows from its number."""
    batches: dict[int, list[int]] = {}
    for index in indexes:
        batches.setdefault(index // BATCH_FILES, []).append(index)
    return [
        Batch(
            run_seed=run_seed,
            indexes=tuple(members),
            windows="all" if number % ALL_WINDOWS_EVERY == ALL_WINDOWS_EVERY - 1 else "first",
            folder=str(folder / f"batch-{number}"),
            timeout_s=timeout_s,
        )
        for number, members in batches.items()
    ]


def fuzz(
    indexes: Sequence[int], *, run_seed: int, folder: Path, num_processes: int = 2, timeout_s: float = 5.0
) -> Tally:
    """Run mutants in processes of their own and count; the caller judges `Tally.problems`."""
    seeds_folder = folder / "seeds"
    seeds_folder.mkdir(parents=True)
    write_seeds(seeds_folder)
    batches = plan(indexes, run_seed, folder, timeout_s)
    tally = Tally()
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, BaseProcess] = {}
    for share in (batches[i::num_processes] for i in range(num_processes)):
        if share:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=serve, args=(theirs, share, str(seeds_folder)))
            process.start()
            theirs.close()
            workers[ours] = process
    _collect(workers, tally, 2 * timeout_s + START_SLACK_S)
    return tally


def _collect(workers: dict[Connection, BaseProcess], tally: Tally, limit_s: float) -> None:
    """Listen until every process is through, dead, or silent for too long."""
    at_work: dict[Connection, tuple[int, ...]] = {}
    last: dict[Connection, tuple[float, str]] = {ours: (time.monotonic(), "its start") for ours in workers}
    while workers:
        for ours in wait(list(workers), timeout=1.0):
            if isinstance(ours, Connection):
                _hear(ours, workers, tally, at_work, last, limit_s)
        for ours in [c for c in workers if time.monotonic() - last[c][0] > limit_s + 60]:
            tally.problems.append(f"a process hangs after {last[ours][1]}")
            workers.pop(ours).kill()


def _hear(
    ours: Connection,
    workers: dict[Connection, BaseProcess],
    tally: Tally,
    at_work: dict[Connection, tuple[int, ...]],
    last: dict[Connection, tuple[float, str]],
    limit_s: float,
) -> None:
    try:
        message = ours.recv()
    except EOFError:
        process = workers.pop(ours)
        process.join()
        batch = at_work.get(ours, (0,))
        tally.problems.append(
            f"a process died with exit code {process.exitcode} in #{batch[0]} to #{batch[-1]} after {last[ours][1]}"
        )
        return
    if message is None:
        workers.pop(ours).join()
    elif isinstance(message, Call):
        tally.add_call(message, limit_s)
        last[ours] = (time.monotonic(), message.name)
    elif isinstance(message, Result):
        tally.add_result(message, len(at_work[ours]))
        last[ours] = (time.monotonic(), "the end of a batch")
    else:
        at_work[ours] = message


def keep(index: int, run_seed: int, folder: Path) -> Path:
    """Write one mutant of a run again."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        mutant = make_mutant(write_seeds(Path(scratch)), run_seed, index)
    path = folder / file_name(mutant_stem(index), mutant)
    path.write_bytes(mutant.content)
    sys.stdout.write(f"{mutant.recipe} -> {path}\n")
    return path


def main() -> int:
    """Parse, run, report; 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--timeout-s", type=float, default=5.0, help="of one clip's decoding")
    parser.add_argument("--only", type=int, help=f"one mutant; every {UNTOUCHED_EVERY}th is an untouched seed")
    parser.add_argument("--keep", type=Path, help="folder for the mutant of --only")
    options = parser.parse_args()
    if options.keep is not None and options.only is not None:
        keep(options.only, options.seed, options.keep)
    indexes = range(options.files) if options.only is None else [options.only]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        tally = fuzz(
            indexes,
            run_seed=options.seed,
            folder=Path(scratch),
            num_processes=options.processes,
            timeout_s=options.timeout_s,
        )
    sys.stdout.write("\n".join(tally.lines()) + "\n")
    return 1 if tally.problems or tally.files != len(indexes) else 0


if __name__ == "__main__":
    sys.exit(main())
