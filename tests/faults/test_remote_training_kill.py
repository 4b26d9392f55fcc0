"""SIGKILL of a training whose folder is in an object store, with a checkpoint half uploaded; then the same command."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.data.storage import open_folder
from pipelines.training.journal import parse_journal
from tests.feature_factory import write_features
from tests.storage_servers import FOR_EVER, environment, fault_proxy, s3, s3_address
from tests.training_runs import losses_of

__all__ = ["s3", "s3_address"]
ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0


def _command(features: str, out: str) -> list[str]:
    flags = ["--size", "tiny", "--features", features, "--num-workers", "0", "--ema-width", "None"]
    flags += ["--ema-decay", "0.9", "--steps", "12", "--batch-size", "8", "--lr", "1e-3", "--checkpoint-every", "4"]
    return [sys.executable, str(ROOT / "jobs" / "train_mmdit.py"), *flags, "--out", out]


def _run(command: list[str], variables: dict[str, str]) -> str:
    # In a folder of its own: the journal of an object store is shipped to the tests' store, a file there.
    done = subprocess.run(
        command, env=variables, cwd=variables["HOME"], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_training_killed_in_an_upload_goes_on_on_another_node_to_the_bytes_of_an_undisturbed_one(
    s3: str, s3_address: tuple[str, int], tmp_path: Path
) -> None:
    features = write_features(tmp_path / "features", {"train": 40, "val": 8})
    # Features too come from the object store.
    for path in features.rglob("*"):
        if path.is_file():
            open_folder(f"{s3}/features").write_bytes(str(path.relative_to(features)), path.read_bytes())
    with fault_proxy(s3_address) as (url, faults), ThreadPoolExecutor(1) as beside:
        variables = {**os.environ, **environment(url), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        for node in ("node", "other_node"):
            (tmp_path / node).mkdir()
        variables["HOME"] = str(tmp_path / "node")
        undisturbed = beside.submit(_run, _command(str(features), str(tmp_path / "whole")), variables)
        command = _command(f"{s3}/features", f"{s3}/out")
        faults.inject("silence", FOR_EVER, method="PUT", matches=lambda target: "step_00000008-1/average" in target)
        with (tmp_path / "killed.log").open("w") as sink:
            killed = subprocess.Popen(command, env=variables, cwd=tmp_path, stdout=sink, stderr=sink)
            started = time.monotonic()
            while faults.injected == 0:
                assert killed.poll() is None, (tmp_path / "killed.log").read_text()
                assert time.monotonic() - started < LIMIT_S
                time.sleep(0.05)
            killed.send_signal(signal.SIGKILL)
            killed.wait()
        assert "step_00000008-1" in open_folder(f"{s3}/out").list_names("checkpoints")
        faults.inject("", 0)
        # Nothing of the first node is there.
        told = _run(command, {**variables, "HOME": str(tmp_path / "other_node")})
        undisturbed.result()
    assert "train_mmdit: resume" in told
    folder, whole = open_folder(f"{s3}/out"), tmp_path / "whole"
    first, second = (
        json.loads(text) for text in (folder.read_bytes("manifest.json"), (whole / "manifest.json").read_bytes())
    )
    assert first["notes"] == ["checkpoint step_00000008-1 passed over: no COMPLETE file: it was never finished"]
    assert (first["fingerprint"], first["metrics"]) == (second["fingerprint"], second["metrics"])
    assert first["files"] == second["files"]
    for entry in first["files"]:
        assert folder.read_bytes(entry["path"]) == (whole / entry["path"]).read_bytes()
    losses = [record["loss"] for record in parse_journal(folder.read_bytes("metrics.jsonl"))]
    assert losses == losses_of(whole)
    left = set(folder.list_names()) - {entry["path"] for entry in first["files"]}
    assert left == {"config.yaml", "manifest.json", "metrics.jsonl", "stage.json"}
