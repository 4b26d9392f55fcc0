"""One process of a fuzz run: batches of mutants through `preprocess()` as a job calls it, with a watch on the decoder.

The watch measures and changes nothing: seconds, outcome, child and its memory for every call of the real decoder.
"""

import contextlib
import os
import re
import resource
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from pipelines.data.contracts import FEATURES
from pipelines.data.decoding import Decoder
from pipelines.data.media_folder import list_videos
from pipelines.data.names import MEDIA_SUFFIXES
from pipelines.data.preprocess import preprocess
from pipelines.data.preprocess_settings import PreprocessSettings
from pipelines.data.store import Dataset
from pipelines.data.units import HERE
from pipelines.errors import MediaError, Refused
from pipelines.tracking import LAUNCH_VARIABLE, LaunchReference
from tests.fuzz.checks import breaches
from tests.fuzz.mutators import Mutant, make_mutant
from tests.fuzz.seeds import SEEDS

SAMPLING_S = 0.05
EXPECTED = {seed.name: seed.expected for seed in SEEDS}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Mutants that become one dataset."""

    run_seed: int
    indexes: tuple[int, ...]
    windows: Literal["first", "all"]
    folder: str
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the decoder."""

    name: str
    seconds: float
    outcome: str
    """`ok`, or reason and detail."""
    child_lost: bool
    """The child is another one than before, and it was not its time."""
    child_peak_bytes: int


@dataclass(kw_only=True)
class Result:
    """What became of a batch."""

    problems: list[str] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    details: list[tuple[str, str]] = field(default_factory=list)
    """(recipe, detail) of what cost a child."""
    parent_peak_bytes: int = 0


def run_batch(batch: Batch, seeds: Mapping[str, bytes], report: Callable[[Call], None]) -> Result:
    """Write the mutants, make a dataset of their folder, check it; the folder is gone afterwards."""
    folder = Path(batch.folder)
    clips = folder / "clips"
    clips.mkdir(parents=True)
    mutants = {mutant_stem(i): make_mutant(seeds, batch.run_seed, i) for i in batch.indexes}
    for stem, mutant in mutants.items():
        (clips / file_name(stem, mutant)).write_bytes(mutant.content)
    settings = PreprocessSettings(
        spec="tiny",
        encoders="grids",
        windows=batch.windows,
        hop_s=1.0 if batch.windows == "all" else None,
        timeout_s=batch.timeout_s,
    )
    with watched(report), contextlib.suppress(Refused):
        preprocess(list_videos(str(clips)), settings, out=str(folder / "out"), pool=HERE, max_reject_rate=1.0)
    result = _judge(Dataset.open(str(folder / "out"), FEATURES), mutants, batch.windows)
    result.parent_peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shutil.rmtree(folder)
    return result


def mutant_stem(index: int) -> str:
    """The file's stem, which is the clip's key."""
    return f"m{index:07d}"


def file_name(stem: str, mutant: Mutant) -> str:
    """With the seed's suffix, where folders are searched for it."""
    suffix = Path(mutant.seed_name).suffix
    return stem + (suffix if suffix in MEDIA_SUFFIXES else ".mp4")


def _judge(dataset: Dataset, mutants: Mapping[str, Mutant], windows: str) -> Result:
    result = Result(problems=breaches(dataset, set(mutants)))
    outcomes = dict.fromkeys(dataset.read(["clip_id"])["clip_id"].to_pylist(), "row")
    for reject in dataset.read_rejects().to_pylist():
        outcomes[reject["clip_id"]] = reject["reason"]
        if reject["reason"] in ("timeout", "decoder_crash"):
            mutant = mutants[reject["clip_id"].partition("#")[0]]
            result.details.append((mutant.recipe, f"{reject['reason']}: {reject['detail']}"))
    for outcome in outcomes.values():
        result.reasons[outcome] = result.reasons.get(outcome, 0) + 1
    for stem, mutant in mutants.items():
        found = outcomes.get(stem)
        if not mutant.steps and windows == "first" and found != EXPECTED[mutant.seed_name]:
            result.problems.append(f"{mutant.recipe} became '{found}', expected '{EXPECTED[mutant.seed_name]}'")
    return result


@contextlib.contextmanager
def watched(report: Callable[[Call], None]) -> Any:
    """Every call of `Decoder.decode` and `Decoder.probe` in this process is measured and told."""
    originals = {"decode": Decoder.decode, "probe": Decoder.probe}
    for name, original in originals.items():
        setattr(Decoder, name, _measured(original, report))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(Decoder, name, original)


def _measured(original: Callable[..., Any], report: Callable[[Call], None]) -> Callable[..., Any]:
    served: Counter[int | None] = Counter()

    def measured(decoder: Decoder, path: str | Path, *arguments: Any) -> Any:
        before, started, outcome = decoder.child_pid, time.monotonic(), "ok"
        with _MemoryWatch(decoder) as memory:
            try:
                return original(decoder, path, *arguments)
            except MediaError as error:
                outcome = str(error)
                raise
            finally:
                due = served[before] >= decoder.limits.clips_per_child
                served[decoder.child_pid] += 1
                call = Call(
                    name=os.path.basename(path),  # noqa: PTH119 - a path may hold undecodable bytes
                    seconds=time.monotonic() - started,
                    outcome=outcome,
                    child_lost=before is not None and before != decoder.child_pid and not due,
                    child_peak_bytes=memory.stop(),
                )
                report(call)

    return measured


class _MemoryWatch:
    """The highest memory of a decoder's children during a call: sampled, since a dead one tells nothing any more."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._peak_bytes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "_MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def stop(self) -> int:
        """End the sampling; the peak in bytes."""
        self._end.set()
        self._thread.join()
        self._look()
        return self._peak_bytes

    def _sample(self) -> None:
        while not self._end.wait(SAMPLING_S):
            self._look()

    def _look(self) -> None:
        pid = self._decoder.child_pid
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
            self._peak_bytes = max(self._peak_bytes, int(found[1]) * 1024 if found else 0)


def serve(connection: Connection, batches: Sequence[Batch], seeds_folder: str) -> None:
    """The process's main: runs its batches and tells of every call and every batch."""
    silence(Path(seeds_folder).parent)
    seeds = {path.name: path.read_bytes() for path in sorted(Path(seeds_folder).iterdir())}
    for batch in batches:
        connection.send(batch.indexes)
        connection.send(run_batch(batch, seeds, connection.send))
    connection.send(None)


def silence(folder: Path) -> None:
    """One thread, no MLflow server (a launch in `folder` that nobody ships), and nothing of the stage's own lines."""
    import torch

    torch.set_num_threads(1)
    reference = LaunchReference(journal_id="fuzz", folder=str(folder), store="sqlite:///unused.db")
    os.environ[LAUNCH_VARIABLE] = reference.to_text()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
