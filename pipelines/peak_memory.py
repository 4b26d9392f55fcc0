"""The most memory that a stretch of work held, of this process and of its GPU.

The kernel's high-water mark of resident memory and not `ru_maxrss`, which a process inherits from the one that started
it. Linux only.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_HIGH_WATER_MARK = "5"
"""See proc_pid_clear_refs(5)."""


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes at their highest."""

    process_bytes: int
    """Resident memory of this process; children are not in it."""
    gpu_bytes: int | None
    """Tensors on the GPU; None without one."""

    def __str__(self) -> str:
        """`1234 MiB`, and what of the GPU."""
        gpu = "" if self.gpu_bytes is None else f" and {_mebibytes(self.gpu_bytes)} of the GPU"
        return _mebibytes(self.process_bytes) + gpu


def restart_peak(device: torch.device) -> None:
    """Let the peaks count from now on; where the kernel refuses, that of the process counts from its start still."""
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text(RESET_HIGH_WATER_MARK)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> PeakMemory:
    """The peaks since the last restart, or the start of the process."""
    gpu_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return PeakMemory(process_bytes=process_peak_bytes(os.getpid()), gpu_bytes=gpu_bytes)


def process_peak_bytes(pid: int) -> int:
    """The most resident memory of a living process since its start, or since it was restarted for that process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
