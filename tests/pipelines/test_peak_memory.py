"""The peak is what was held at most since the last restart."""

import subprocess
import sys
from pathlib import Path

from pipelines.peak_memory import PeakMemory

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
HOLD_AND_FREE = """
import numpy as np
import torch
from pipelines.peak_memory import peak_memory, restart_peak

device = torch.device("cpu")
restart_peak(device)
before = peak_memory(device)
held = np.ones(200 << 20, np.uint8)
del held
after = peak_memory(device)
restart_peak(device)
print(before.process_bytes, after.process_bytes, peak_memory(device).process_bytes, after.gpu_bytes)
"""
"""In a process of its own: one that has run a thousand tests may find 200 MiB among what it has freed before."""


def test_the_peak_sees_what_was_freed_again_and_a_restart_forgets_it() -> None:
    done = subprocess.run([sys.executable, "-c", HOLD_AND_FREE], cwd=ROOT, check=True, capture_output=True, text=True)
    before, after, again, gpu = done.stdout.split()
    assert int(after) - int(before) > 150 * MIB
    assert int(after) - int(again) > 150 * MIB
    assert gpu == "None"


def test_it_is_written_for_people() -> None:
    assert str(PeakMemory(process_bytes=512 * MIB, gpu_bytes=None)) == "512 MiB"
    assert str(PeakMemory(process_bytes=512 * MIB, gpu_bytes=2048 * MIB)) == "512 MiB and 2048 MiB of the GPU"
