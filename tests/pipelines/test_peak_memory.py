"""The peak is what was held at most since the last restart."""

import numpy as np
import torch

from pipelines.peak_memory import PeakMemory, peak_memory, restart_peak

CPU = torch.device("cpu")
MIB = 1 << 20


def test_the_peak_sees_what_was_freed_again_and_a_restart_forgets_it() -> None:
    restart_peak(CPU)
    before = peak_memory(CPU)
    held = np.ones(200 * MIB, np.uint8)
    del held
    after = peak_memory(CPU)
    assert after.process_bytes - before.process_bytes > 150 * MIB
    restart_peak(CPU)
    assert after.process_bytes - peak_memory(CPU).process_bytes > 150 * MIB
    assert after.gpu_bytes is None


def test_it_is_written_for_people() -> None:
    assert str(PeakMemory(process_bytes=512 * MIB, gpu_bytes=None)) == "512 MiB"
    assert str(PeakMemory(process_bytes=512 * MIB, gpu_bytes=2048 * MIB)) == "512 MiB and 2048 MiB of the GPU"
