"""What a manifest of a million rows costs before the first clip is decoded: python -m benchmarks.plan_scale.

Each number of rows is measured in a process of its own: a csv with caption, split and start is read, fingerprinted,
planned and sorted; no file of it exists.
"""

import argparse
import subprocess
import sys
import tempfile
import time
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
    from pipelines.data.ingest import read_entries
    from pipelines.data.plan import plan_windows

    base_mb = peak_rss_mb()
    marks = [time.process_time()]
    entries = read_entries(manifest)
    marks.append(time.process_time())
    fingerprint = entries.fingerprint
    marks.append(time.process_time())
    plan = plan_windows(entries, clip_s=8.0)
    marks.append(time.process_time())
    peak_mb = peak_rss_mb()
    steps = [b - a for a, b in pairwise(marks)]
    print(len(plan), *steps, base_mb, peak_mb, fingerprint)


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
            read_s, fingerprint_s, plan_s, base_mb, peak_mb = (float(x) for x in output[1:6])
            table.append(
                {
                    "rows": int(output[0]),
                    "read CPU s": read_s,
                    "fingerprint CPU s": fingerprint_s,
                    "plan and sort CPU s": plan_s,
                    "all CPU s": read_s + fingerprint_s + plan_s,
                    "peak RSS MB": peak_mb,
                    "bytes a row": (peak_mb - base_mb) * 1e6 / int(output[0]),
                }
            )
    show("start of a stage over a manifest", table, options.json)


if __name__ == "__main__":
    main()
