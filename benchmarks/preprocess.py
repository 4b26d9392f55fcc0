"""Clips a second of preprocess against a bare PyAV loop over the same windows: python -m benchmarks.preprocess.

The bare loop demuxes and decodes, on one thread a process, every packet from the window's start (or the key frame
before it) until picture and sound have passed its end, and keeps nothing. Two measures, because machines are shared:

- clips/s: rows committed from the moment when every worker has committed a unit to the last commit, over that time; so
  the start of Ray, of actors and of decode children is not in it.
- CPU ms a clip, of parent and decode child together, in this process without Ray: what a run over all windows costs
  more than one over a quarter of them, so that neither imports nor the tracking's process are in it.

Then where the CPU time goes, stage by stage, and the peak memory of parent and child.
"""

import argparse
import csv
import os
import resource
import shutil
import tempfile
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
from models.codec import build_codec
from models.encoders import VideoGrid, build_encoders
from models.spec import SPECS, ClipSpec
from pipelines.cluster import connect
from pipelines.data import media, media_mix, media_scale, media_tracks
from pipelines.data.clip_worker import frame_grid
from pipelines.data.contracts import FEATURES
from pipelines.data.decoding import Decoder
from pipelines.data.demo_world_job import CLIPS_CSV, make_demo_world
from pipelines.data.frames import encode_jpeg
from pipelines.data.ingest import read_entries
from pipelines.data.media_write import encode_flac
from pipelines.data.preprocess import preprocess
from pipelines.data.preprocess_settings import PreprocessSettings
from pipelines.data.sound import wave_of
from pipelines.data.source import SourceReader
from pipelines.data.store import encode_part
from pipelines.data.tables import table_from_rows
from pipelines.data.units import HERE, Pool
from pipelines.data.window import DecodedWindow, WindowRequest
from pipelines.errors import MediaError

SETTINGS = PreprocessSettings(spec="tiny", encoders="grids")
MAX_PIXELS = 4096 * 2304
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


def cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def peak_mib(pid: int) -> float:
    """Peak resident memory of a living process so far, MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def cpu_row(manifests: Sequence[tuple[str, int]], scratch: str, windows: Sequence[Window]) -> dict[str, object]:
    """CPU a clip of the bare loop and of preprocess, in this process and one child.

    `manifests` are two, with their numbers of windows: a part of all, and all.
    """
    for window in windows[:2]:
        decode_only(window)
    started = cpu_s()
    for window in windows:
        decode_only(window)
    bare = (cpu_s() - started) / len(windows)
    spent = []
    # The part once before, uncounted: the first run of a process imports and warms up, which would be taken off.
    for turn, (manifest, _) in enumerate((manifests[0], *manifests)):
        started = cpu_s()
        out = f"{scratch}/here_{turn}"
        preprocess(read_entries(manifest), SETTINGS, out=out, pool=HERE, max_reject_rate=1.0)
        spent.append(cpu_s() - started)
    ours = (spent[2] - spent[1]) / (manifests[1][1] - manifests[0][1])
    return {
        "bare CPU ms/clip": bare * 1e3,
        "preprocess CPU ms/clip": ours * 1e3,
        "ratio": bare / ours,
        "peak parent MiB": peak_mib(os.getpid()),
    }


class StageClock:
    """CPU seconds by stage; a stage inside another counts for itself alone."""

    def __init__(self) -> None:
        self.spent_s: defaultdict[str, float] = defaultdict(float)
        self._open: list[float] = []

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time added to `stage`."""

        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            self._open.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took_s = time.process_time() - started
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


def stage_rows(windows: Sequence[Window]) -> tuple[list[dict[str, object]], float]:
    """Where the CPU time of a clip goes, one stage after the other in this process; and a decode child's peak MiB."""
    spec, clock = SPECS[SETTINGS.spec], StageClock()
    decoded = []
    with clock.watching(*CHILD_STAGES):
        for window in windows:
            decoded.append(clock.timed("child: demux, the rest", read_here)(window, spec))
    kept = [(window, found) for window, found in zip(windows, decoded, strict=True) if found is not None]
    with Decoder() as decoder:
        decoder.decode(kept[0][0].path, request_for(kept[0][0], spec))
        for window, _ in kept:
            clock.timed("parent: pipe", decoder.decode)(window.path, request_for(window, spec))
        child_mib = peak_mib(decoder.child_pid or 0)
    parent_stages(kept, spec, clock)
    total_s = sum(clock.spent_s.values())
    rows: list[dict[str, object]] = [
        {"stage": stage, "CPU ms/clip": spent_s / len(windows) * 1e3, "share": spent_s / total_s}
        for stage, spent_s in sorted(clock.spent_s.items())
    ]
    return rows, child_mib


def parent_stages(kept: Sequence[tuple[Window, DecodedWindow]], spec: ClipSpec, clock: StageClock) -> None:
    """What preprocess does to decoded windows, one unit, timed by stage."""
    encoders, codec = build_encoders(SETTINGS.encoders, spec), build_codec(SETTINGS.spec, decoding=False)
    sources, rows = SourceReader(), []

    def hashed(path: str) -> str:
        with sources.open(path) as source:
            return source.sha256

    # Each once before, so that kernels and imports are not counted.
    for counting in (StageClock(), clock):
        rows.clear()
        for index, (window, found) in enumerate(kept):
            timed = counting.timed
            wave = timed("parent: resample", wave_of)(found, spec.sample_rate_hz, spec.num_samples)
            frames = found.frames[0]
            jpegs = timed("parent: JPEG", lambda frames: [encode_jpeg(frame) for frame in frames])(frames)
            mean, std = timed("parent: latents", codec.encode)(torch.from_numpy(wave)[None])
            rows.append(
                {
                    "clip_id": str(index),
                    "source": window.path,
                    "start_s": window.start_s,
                    "duration_s": spec.duration_s,
                    "valid_s": found.valid_s,
                    "caption": "",
                    "split": "train",
                    "content_hash": timed("parent: hash of the file", hashed)(window.path),
                    "events": None,
                    "frames": jpegs,
                    "audio": timed("parent: FLAC", encode_flac)(wave, spec.sample_rate_hz),
                    **timed("parent: grids", encoders.encode)({encoders.grids[0]: frames}, ""),
                    "latent_mean": mean[0].numpy(),
                    "latent_std": std[0].numpy(),
                }
            )
        table = counting.timed("parent: table, checks", table_from_rows)(rows, FEATURES, spec)
        counting.timed("parent: Parquet, zstd, row hashes", encode_part)(table, FEATURES, spec)


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


def write_manifest(path: Path, windows: Sequence[Window]) -> tuple[str, int]:
    """A manifest of windows of files in its own folder; its path and their number."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "start_s"])
        writer.writerows([Path(window.path).name, window.start_s] for window in windows)
    return str(path), len(windows)


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
        part, whole = write_manifest(files / "part.csv", windows[::4]), write_manifest(files / CLIPS_CSV, windows)
        cpu = cpu_row((part, whole), scratch, windows)
        once = windows[:: options.repeats][:64]
        stages, cpu["peak child MiB"] = stage_rows(once)
        show("CPU of parent and child, one process each", [cpu], None)
        show("where the time goes", stages, None)
        reader = decode_rows(once)
        show("the reader against the bare loop", reader, None)
        rows = [] if options.no_ray else measure_pools(whole[0], scratch, windows, options.workers)
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
