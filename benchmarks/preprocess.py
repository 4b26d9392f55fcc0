"""Clips a second of preprocess against a bare loop that only decodes the same files: python -m benchmarks.preprocess.

Baseline: `--workers` processes that demux and decode every packet of every file with PyAV and keep nothing.
"""

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av

from benchmarks.table import show
from pipelines.cluster import connect
from pipelines.data.demo_world_job import CLIPS_CSV, make_demo_world
from pipelines.data.ingest import read_entries
from pipelines.data.preprocess import preprocess
from pipelines.data.preprocess_settings import PreprocessSettings
from pipelines.data.units import Pool


def decode_only(path: str) -> int:
    """Frames and sound blocks of a file, decoded and dropped."""
    with av.open(path) as container:
        return sum(1 for packet in container.demux() for _ in packet.decode())


def bare_clips_per_s(paths: list[str], workers: int) -> float:
    """Clips a second of the bare loop."""
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(decode_only, paths[:workers]))
        started = time.perf_counter()
        list(pool.map(decode_only, paths, chunksize=8))
        return len(paths) / (time.perf_counter() - started)


def main() -> None:
    """Measure 1 and `--workers` workers on the demo world or on the files of a manifest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", help="clips to use; by default a demo world is made")
    parser.add_argument("--clips", type=int, default=256, help="clips of the demo world")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", help="write the table as JSON too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, connect(num_cpus=options.workers):
        manifest = options.manifest
        if manifest is None:
            make_demo_world(seed=0, counts={"train": options.clips}, out=f"{scratch}/world", num_workers=2)
            manifest = f"{scratch}/world/{CLIPS_CSV}"
        entries = read_entries(manifest)
        paths = [str(path) for path in sorted(Path(manifest).parent.rglob("*.mp4"))]
        bare = bare_clips_per_s(paths, options.workers)
        rows: list[dict[str, object]] = []
        for workers in sorted({1, options.workers}):
            # The first run of a pool starts its processes; the second one is measured beside it.
            started = time.perf_counter()
            dataset = preprocess(
                entries,
                PreprocessSettings(spec="tiny", encoders="grids"),
                out=f"{scratch}/features_{workers}",
                pool=Pool(num_workers=workers),
            )
            seconds = time.perf_counter() - started
            rate = dataset.manifest["counts"]["in"] / seconds
            rows.append({"workers": workers, "clips/s": rate, "bare decode clips/s": bare, "ratio": rate / bare})
    show("preprocess, start-up of the pool included", rows, options.json)


if __name__ == "__main__":
    main()
