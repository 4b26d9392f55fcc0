"""Clips a second of preprocess against a bare PyAV loop over the same windows: python -m benchmarks.preprocess.

The bare loop demuxes and decodes, on one thread a process, every packet from the window's start (or the key frame
before it) until picture and sound have passed its end, and keeps nothing. Two measures, because machines are shared:

- clips/s: rows committed from the moment when every worker has committed a unit to the last commit, over that time; so
  the start of Ray, of actors and of decode children is not in it.
- CPU ms a clip, of a worker and its decode child together, in this process without Ray, from the file to the
  committed part; neither imports nor the start of the child are in it.

Then where the CPU time goes, stage by stage, and the peak memory of parent and child.
"""

import argparse
import csv
import os
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import av
import torch
from av.frame import Frame

from benchmarks.table import show
from models.encoders import VideoGrid
from models.spec import SPECS, ClipSpec
from pipelines.cluster import connect
from pipelines.data import clip_worker, measures, media, media_mix, media_scale, media_tracks
from pipelines.data.clip_worker import ClipWorker, frame_grid
from pipelines.data.commits import commit_unit
from pipelines.data.contracts import FEATURES
from pipelines.data.decoding import DecodeLimits, Decoder
from pipelines.data.demo_world_job import CLIPS_CSV, make_demo_world
from pipelines.data.ingest import read_entries
from pipelines.data.plan import plan_windows
from pipelines.data.preprocess import find_networks, planned_rows, preprocess
from pipelines.data.preprocess_settings import PreprocessSettings
from pipelines.data.source import SourceReader
from pipelines.data.storage import open_folder
from pipelines.data.store import ROW_GROUP_ROWS, encode_part
from pipelines.data.units import Pool, Unit
from pipelines.data.window import DecodedWindow, WindowRequest
from pipelines.errors import MediaError
from pipelines.peak_memory import process_peak_bytes

SETTINGS = PreprocessSettings(spec="tiny", encoders="grids")
MAX_PIXELS = 4096 * 2304
CLIPS_OF_CHILD = DecodeLimits().clips_per_child - 8
STEP_S = 0.01
"""Repeats of a file are windows that begin so much later each time: other keys, the same work."""


@dataclass(frozen=True)
class Window:
    """What is decoded."""

    path: str
    start_s: float
    duration_s: float


def decode_only(window: Window) -> int:
    """Decode a window and drop it; the number of frames and sound blocks."""
    start_s, end_s = window.start_s, window.start_s + window.duration_s
    with av.open(window.path) as container:
        streams = [container.streams.video[0], container.streams.audio[0]]
        for stream in streams:
            stream.codec_context.thread_count = 1
        if start_s > 2 * media.SEEK_MARGIN_S:
            container.seek(int((start_s - media.SEEK_MARGIN_S) * 1_000_000))
        waiting, count = set(streams), 0
        for packet in container.demux(streams):
            for frame in packet.decode():
                count += 1
                if isinstance(frame, Frame) and frame.time is not None and frame.time >= end_s:
                    waiting.discard(packet.stream)
            if not waiting:
                break
        return count


def bare_clips_per_s(windows: Sequence[Window], workers: int) -> float:
    """Clips a second of the bare loop in so many processes that are already there."""
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(decode_only, windows[: 2 * workers]))
        started = time.perf_counter()
        list(pool.map(decode_only, windows, chunksize=8))
        return len(windows) / (time.perf_counter() - started)


def preprocess_clips_per_s(manifest: str, out: str, workers: int) -> float:
    """Clips a second between the commit of the `workers`-th unit and the last one."""
    dataset = preprocess(read_entries(manifest), SETTINGS, out=out, pool=Pool(num_workers=workers), max_reject_rate=1.0)
    commits = sorted((Path(out, part.path).stat().st_mtime, part.rows) for part in dataset.parts)
    if len(commits) < 3 * workers:
        raise SystemExit(f"{len(commits)} units are too few for {workers} workers; give more --clips or --repeats")
    return sum(rows for _, rows in commits[workers:]) / (commits[-1][0] - commits[workers - 1][0])


def child_cpu_s(pid: int) -> float:
    """CPU seconds of a living process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def worker_of(manifest: str) -> Iterator[tuple[ClipWorker, tuple[Any, ...]]]:
    """A worker that has worked before, so that imports, kernels and its child's start are past; a manifest's rows."""
    plan = plan_windows(read_entries(manifest), clip_s=SETTINGS.clip_spec.duration_s, windows=SETTINGS.windows)
    rows = tuple(planned_rows(plan))
    worker = ClipWorker(SETTINGS, find_networks(SETTINGS), torch.device("cpu"))
    try:
        worker.process(Unit(unit_id="before", split="train", rows=rows[:4]), lambda: None)
        yield worker, rows
    finally:
        worker.close()


def cpu_row(manifest: str, windows: Sequence[Window], scratch: str) -> dict[str, object]:
    """CPU a clip of the bare loop and of a worker with its child, from the file to the committed part.

    In turns, a unit each, so that the machine's other load falls on both. A child lives for 256 clips; there must be
    one that lives through all.
    """
    folder, bare, ours = open_folder(f"{scratch}/committed"), 0.0, 0.0
    with worker_of(manifest) as (worker, rows):
        child = worker.child_pid
        if child is None:
            raise SystemExit("no clip could be decoded")
        for start in range(0, len(rows), ROW_GROUP_ROWS):
            started = time.process_time()
            for window in windows[start : start + ROW_GROUP_ROWS]:
                decode_only(window)
            between, childs_s = time.process_time(), child_cpu_s(child)
            unit = Unit(unit_id=f"train-{start}", split="train", rows=rows[start : start + ROW_GROUP_ROWS])
            commit_unit(folder, unit, *worker.process(unit, lambda: None), FEATURES, SETTINGS.clip_spec)
            bare += between - started
            ours += time.process_time() - between + child_cpu_s(child) - childs_s
        child_peak_bytes = process_peak_bytes(child)
    return {
        "clips": len(rows),
        "bare CPU ms/clip": bare / len(rows) * 1e3,
        "preprocess CPU ms/clip": ours / len(rows) * 1e3,
        "ratio": bare / ours,
        "peak parent MiB": process_peak_bytes(os.getpid()) / 2**20,
        "peak child MiB": child_peak_bytes / 2**20,
    }


class StageClock:
    """CPU seconds of threads by stage; a stage inside another counts for itself alone."""

    def __init__(self) -> None:
        self.spent_s: defaultdict[str, float] = defaultdict(float)
        self._threads = threading.local()

    @property
    def _open(self) -> list[float]:
        """Of each stage that this thread is in, how long it was in inner ones."""
        if not hasattr(self._threads, "open"):
            self._threads.open = []
        return self._threads.open

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time added to `stage`."""

        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            self._open.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took_s = time.thread_time() - started
                self.spent_s[stage] += took_s - self._open.pop()
                if self._open:
                    self._open[-1] += took_s

        return measured

    @contextmanager
    def watching(self, *watched: tuple[str, type | Any, str]) -> Iterator[None]:
        """Time (stage, owner, function's name) inside the block."""
        originals = [(owner, name, vars(owner)[name]) for _, owner, name in watched]
        try:
            for stage, owner, name in watched:
                setattr(owner, name, self.timed(stage, vars(owner)[name]))
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)


CHILD_STAGES = (
    ("child: open, probe the streams", media, "open_media"),
    ("child: decode pictures", media_tracks.PictureTrack, "read"),
    ("child: decode pictures", media_tracks.PictureTrack, "finish"),
    ("child: colour, scale, crop", media_scale.FrameScaler, "__call__"),
    ("child: decode and place sound", media_tracks.SoundTrack, "read"),
    ("child: mix sound to mono", media_mix.MonoMixer, "__call__"),
)


PARENT_STAGES = (
    ("parent: hash of the file", SourceReader, "_hash_of"),
    ("parent: pipe", Decoder, "decode"),
    ("parent: resample", clip_worker, "wave_of"),
    ("parent: JPEG", clip_worker, "encode_jpeg"),
    ("parent: FLAC", clip_worker, "encode_flac"),
    ("parent: measures of sound", measures, "measure_sound"),
    ("parent: measures of pictures", measures, "measure_picture"),
    ("parent: conditions, latents", ClipWorker, "_encode"),
    ("parent: table, checks", clip_worker, "table_from_rows"),
)


def request_for(window: Window, spec: ClipSpec) -> WindowRequest:
    """What preprocess asks of the reader for SF-CAVP, and for the tiny encoders, which look at the same grid."""
    grid = VideoGrid(rate_hz=spec.frames_rate_hz, size_px=spec.frames_px, fit="stretch")
    return WindowRequest(
        start_s=window.start_s,
        duration_s=spec.duration_s,
        grids=(frame_grid(grid, spec),),
        audio_rate_hz=spec.sample_rate_hz,
        audio_samples=spec.num_samples,
        max_pixels=MAX_PIXELS,
    )


def read_here(window: Window, spec: ClipSpec) -> DecodedWindow | None:
    """The reader's work on a window in this process; None where the clip would be rejected."""
    try:
        with Path(window.path).open("rb") as file:
            return media.read_window(file, request_for(window, spec))
    except MediaError:
        return None


def stage_rows(manifest: str, windows: Sequence[Window]) -> list[dict[str, object]]:
    """Where the CPU time of a clip goes, on one thread each.

    The child's work is timed in this process, the parent's while a worker does a unit of `manifest`, which lists
    the same windows.
    """
    clock = StageClock()
    with clock.watching(*CHILD_STAGES):
        for window in windows:
            clock.timed("child: demux, the rest", read_here)(window, SETTINGS.clip_spec)
    with worker_of(manifest) as (worker, rows), clock.watching(*PARENT_STAGES):
        unit = Unit(unit_id="timed", split="train", rows=rows)
        features, _ = clock.timed("parent: the rest", worker.process)(unit, lambda: None)
        clock.timed("parent: Parquet, zstd, row hashes", encode_part)(features, FEATURES, SETTINGS.clip_spec)
    total_s = sum(clock.spent_s.values())
    return [
        {"stage": stage, "CPU ms/clip": spent_s / len(windows) * 1e3, "share": spent_s / total_s}
        for stage, spent_s in sorted(clock.spent_s.items())
    ]


def decode_rows(windows: Sequence[Window]) -> list[dict[str, object]]:
    """The reader alone against the bare loop, for the tiny spec's windows and for those of the 16k spec."""
    rows: list[dict[str, object]] = []
    for name in ("tiny", "16k"):
        spec = SPECS[name]
        chosen = [Window(w.path, w.start_s, spec.duration_s) for w in windows]
        bare = ours = 0.0
        # In turns, so that the machine's other load falls on both.
        for window in chosen:
            started = time.process_time()
            decode_only(window)
            between = time.process_time()
            read_here(window, spec)
            bare, ours = bare + between - started, ours + time.process_time() - between
        rows.append(
            {
                "window": f"{spec.duration_s:g} s, {spec.frames_px} px at {spec.frames_rate_hz} fps",
                "bare CPU ms": bare / len(chosen) * 1e3,
                "reader CPU ms": ours / len(chosen) * 1e3,
                "ratio": bare / ours,
            }
        )
    return rows


def linked(folder: Path, paths: Sequence[Path], repeats: int) -> list[Window]:
    """`repeats` windows of every file, all of which are brought into `folder`."""
    windows = []
    for path in paths:
        copy = folder / path.name
        try:
            os.link(path, copy)
        except OSError:
            shutil.copyfile(path, copy)
        windows += [Window(str(copy), round(i * STEP_S, 3), SPECS[SETTINGS.spec].duration_s) for i in range(repeats)]
    return windows


def write_manifest(path: Path, windows: Sequence[Window]) -> str:
    """A manifest of windows of files in its own folder; its path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "start_s"])
        writer.writerows([Path(window.path).name, window.start_s] for window in windows)
    return str(path)


def main() -> None:
    """Measure 1 and `--workers` workers on the files of a folder, or on a demo world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", help="folder of mp4 files to use; by default a demo world is made")
    parser.add_argument("--clips", type=int, default=512, help="clips of the demo world")
    parser.add_argument("--repeats", type=int, default=1, help="windows taken of every file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-ray", action="store_true", help="CPU times and stages alone")
    parser.add_argument("--json", help="write the tables as JSON too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder, files = options.videos, Path(scratch, "media")
        if folder is None:
            make_demo_world(seed=0, counts={"train": options.clips}, out=f"{scratch}/world", num_workers=0)
            folder = f"{scratch}/world"
        files.mkdir()
        windows = linked(files, sorted(Path(folder).rglob("*.mp4")), options.repeats)
        few, once = windows[:CLIPS_OF_CHILD], windows[:: options.repeats][:ROW_GROUP_ROWS]
        cpu = cpu_row(write_manifest(files / "few.csv", few), few, scratch)
        stages = stage_rows(write_manifest(files / "once.csv", once), once)
        show("CPU of parent and child, one process each", [cpu], None)
        show("where the time goes", stages, None)
        reader = decode_rows(once)
        show("the reader against the bare loop", reader, None)
        rows = (
            []
            if options.no_ray
            else measure_pools(write_manifest(files / CLIPS_CSV, windows), scratch, windows, options.workers)
        )
        show("preprocess", rows or [cpu], options.json, {"cpu": cpu, "reader": reader, "stages": stages})


def measure_pools(manifest: str, scratch: str, windows: Sequence[Window], workers: int) -> list[dict[str, object]]:
    """Clips a second with 1 and with `workers` workers, each beside the bare loop in as many processes."""
    rows: list[dict[str, object]] = []
    with connect(num_cpus=workers):
        for count in sorted({1, workers}):
            measure = partial(bare_clips_per_s, windows, count)
            before = measure()
            rate = preprocess_clips_per_s(manifest, f"{scratch}/features_{count}", count)
            # Before and after, so that a machine that gets busier does not favour either.
            bare = (before + measure()) / 2
            rows.append({"workers": count, "clips/s": rate, "bare clips/s": bare, "ratio": rate / bare})
    for row in rows:
        row["times 1 worker"] = float(str(row["clips/s"])) / float(str(rows[0]["clips/s"]))
    return rows


if __name__ == "__main__":
    main()
