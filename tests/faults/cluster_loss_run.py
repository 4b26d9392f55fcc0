"""The body of test_fault_cluster; see `tests.own_process`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CLIPS = 700


def main(folder: Path) -> dict[str, Any]:
    """Preprocess on two nodes; kill the second, later the head; start another head and give the same command."""
    from tests.faults.kill_storm import make_corpus
    from tests.pipelines.two_nodes_run import start_cluster

    manifest, out = make_corpus(folder / "corpus", CLIPS), folder / "out"
    cluster, second = start_cluster(2)
    driver = _submit(manifest, out, cluster.address, folder)
    _wait_for_parts(driver, out, 2)
    at_node_loss = _parts(out)
    cluster.remove_node(second, allow_graceful=False)
    _wait_for_parts(driver, out, at_node_loss + 3)
    at_head_loss = _parts(out)
    cluster.shutdown()
    first_exit = driver.wait(timeout=180)
    cluster, _ = start_cluster(1)
    second_exit = _submit(manifest, out, cluster.address, folder).wait(timeout=300)
    cluster.shutdown()
    found = {
        "parts_at_node_loss": at_node_loss,
        "parts_at_head_loss": at_head_loss,
        "parts": _parts(out),
        "first_exit": first_exit,
        "second_exit": second_exit,
    }
    return {**found, **_compare(manifest, out, folder / "quiet")}


def _flags(manifest: Path, out: Path, workers: int) -> list[str]:
    numbers = ["--num-workers", str(workers), "--max-reject-rate", "0.5"]
    return ["tiny", "--manifest", str(manifest), "--out", str(out), *numbers]


def _submit(manifest: Path, out: Path, address: str, folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "driver.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "preprocess.py"), *_flags(manifest, out, 2)],
            env={**os.environ, "RAY_ADDRESS": address},
            stdout=log,
            stderr=log,
        )


def _parts(out: Path) -> int:
    return len(list(out.glob("data/part-*.parquet")))


def _wait_for_parts(driver: subprocess.Popen[bytes], out: Path, parts: int) -> None:
    deadline = time.monotonic() + 200
    while _parts(out) < parts:
        if driver.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{_parts(out)} parts; the driver's exit: {driver.poll()}")
        time.sleep(0.02)


def _compare(manifest: Path, out: Path, quiet: Path) -> dict[str, Any]:
    from jobs import cli, preprocess
    from pipelines.data.contracts import FEATURES
    from pipelines.data.store import Dataset

    preprocess.main(cli.parse("preprocess", preprocess.Options, _flags(manifest, quiet, 0)))
    made, undisturbed = Dataset.open(str(out), FEATURES), Dataset.open(str(quiet), FEATURES)
    return {
        "digest": made.digest,
        "quiet_digest": undisturbed.digest,
        "counts": made.manifest["counts"],
        "quiet_counts": undisturbed.manifest["counts"],
    }


if __name__ == "__main__":
    found = main(Path(sys.argv[1]))
    Path(sys.argv[1], "found.json").write_text(json.dumps(found))
