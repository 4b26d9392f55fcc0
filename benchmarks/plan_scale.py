"""What a manifest of a million rows costs before the first clip is decoded: python -m benchmarks.plan_scale.

Each number of rows is measured in a process of its own: a csv with caption, split and start is read, fingerprinted,
planned, sorted and written; then half of its units are said to be done, and what is left is found. No clip exists.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

CAPTIONS = ("playing the acoustic guitar", "heart sounds, heartbeat", "dog barking in the distance", "ocean surf")
SPLITS = ("train", "train", "train", "rpo", "val", "test")


def write_manifest(path: Path, rows: int) -> None:
    """A csv of `rows` clips, in no order of their keys."""
    with path.open("w", encoding="utf-8") as file:
        file.write("video,start_s,caption,split\n")
        for i in range(rows):
            name = i * 7919 % rows
            caption, split = CAPTIONS[i % len(CAPTIONS)], SPLITS[i % len(SPLITS)]
            file.write(f'videos/{name % 100:02d}/v{name:010d}_000030.mp4,{i % 3}.5,"{caption} {i}",{split}\n')


def peak_rss_mb() -> float:
    """Of this program; getrusage would give the parent's too, from before the exec."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) / 1000


def measure(manifest: str) -> None:
    """Do it, and print CPU seconds of each step and the peak RSS in MB."""
    from pipelines.data.commits import done_units
    from pipelines.data.ingest import read_entries
    from pipelines.data.plan import plan_windows
    from pipelines.data.planned_units import write_plan
    from pipelines.data.preprocess import planned_rows
    from pipelines.data.storage import open_folder

    base_mb = peak_rss_mb()
    marks = [time.process_time()]
    entries = read_entries(manifest)
    marks.append(time.process_time())
    fingerprint = entries.fingerprint
    marks.append(time.process_time())
    plan = plan_windows(entries, clip_s=8.0)
    marks.append(time.process_time())
    with tempfile.TemporaryDirectory() as out:
        units = write_plan(out, plan, planned_rows)
        marks.append(time.process_time())
        pretend_done(Path(out), units.names[::2])
        before = time.process_time()
        done = done_units(open_folder(out))
        todo = [index for index, name in enumerate(units.names) if name not in done]
        resume_s = time.process_time() - before
        assert len(todo) == len(units.names) // 2
    peak_mb = peak_rss_mb()
    steps = [b - a for a, b in pairwise(marks)]
    print(len(plan), *steps, resume_s, base_mb, peak_mb, fingerprint)


def pretend_done(out: Path, names: Sequence[str]) -> None:
    """The parts and receipts of units, without anything in them: what a resumed run lists."""
    for sub, suffix in (("data/part-", ".parquet"), ("receipts/", ".json")):
        for name in names:
            path = out / f"{sub}{name}{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.touch()


def main() -> None:
    """Measure each number of rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--json", help="write the table as JSON too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    # Not above: it brings torch along, which must not be in the processes that are measured.
    from benchmarks.table import show

    table: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        manifest = Path(scratch) / "clips.csv"
        for rows in options.rows:
            write_manifest(manifest, rows)
            command = [sys.executable, "-m", "benchmarks.plan_scale", "--measure", str(manifest)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            read_s, fingerprint_s, plan_s, write_s, resume_s, base_mb, peak_mb = (float(x) for x in output[1:8])
            table.append(
                {
                    "rows": int(output[0]),
                    "read CPU s": read_s,
                    "fingerprint CPU s": fingerprint_s,
                    "plan and sort CPU s": plan_s,
                    "write plan CPU s": write_s,
                    "list done units CPU s": resume_s,
                    "all CPU s": read_s + fingerprint_s + plan_s + write_s + resume_s,
                    "peak RSS MB": peak_mb,
                    "bytes a row": (peak_mb - base_mb) * 1e6 / int(output[0]),
                }
            )
    show("start of a stage over a manifest", table, options.json)


if __name__ == "__main__":
    main()
