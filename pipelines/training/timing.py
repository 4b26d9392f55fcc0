"""Where the time of a step goes, what it costs and how long the run will take, as metrics of the journal.

On a GPU the parts are measured between events on its stream, which cost nothing, and read one step late, when the
device has long passed them: no wait for the device is added. So there the parts in a record are those of the step
before. What a step waits for data is the host's time everywhere.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

Part = Literal["data", "forward", "backward", "communication", "optimizer"]
MEGABYTE = 1e6


class StepClock:
    """Stop watches of the parts of a step; a part that is entered more than once is added up."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._host_s: dict[str, float] = {}
        self._events: list[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = []
        self._events_before: list[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count what runs inside for a part: the device's time on a GPU, the host's for data and on a CPU."""
        if self._on_gpu and name != "data":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        started = time.perf_counter()
        yield
        self._host_s[name] = self._host_s.get(name, 0.0) + time.perf_counter() - started

    def took(self, name: Part, seconds: float) -> None:
        """Note what somebody else has measured for a part."""
        self._host_s[name] = seconds

    def end_step(self) -> dict[str, float]:
        """Seconds by part, as `forward_s`; on a GPU those of the step before, and none after the first step."""
        seconds = {f"{name}_s": spent for name, spent in self._host_s.items()}
        # All or nothing: an event that the device has not passed yet has no time.
        if all(end.query() for _, _, end in self._events_before):
            for name, start, end in self._events_before:
                seconds[f"{name}_s"] = seconds.get(f"{name}_s", 0.0) + start.elapsed_time(end) / 1000
        self._host_s, self._events, self._events_before = {}, [], self._events
        return seconds


@dataclass(frozen=True, kw_only=True)
class DeviceLoad:
    """What one sample asks of a worker's device, and what that can do at most."""

    sample_flops: int
    """Operations of forward and backward."""
    peak_flops: float
    """Of one worker's device, a second."""


class StepMeter:
    """Makes the metrics of cost from the wall time of the steps of this attempt."""

    def __init__(
        self, *, batch_size: int, world_size: int, first_step: int, total_steps: int, load: DeviceLoad | None
    ) -> None:
        """`load`: None where the device is not known or the operations were not counted."""
        self._batch_size, self._world_size = batch_size, world_size
        self._first, self._total = first_step, total_steps
        self._load = load
        self._began_s = time.perf_counter()

    def metrics(self, step: int, step_s: float, parts: dict[str, float], sample_bytes: float) -> dict[str, float]:
        """Metrics of a step.

        Args:
            step: its number from 0.
            step_s: its wall time.
            parts: from `StepClock.end_step`.
            sample_bytes: of a sample's columns, uncompressed, mean over what was read so far.

        Returns:
            `parts` and step_s, samples_per_s (all workers), data_share (of the step's time spent waiting for data),
            sample_bytes, data_mb_per_s (what all workers together need), time_left_s (validations and checkpoints are
            in it as they were so far), and where the device is known tflops_per_s of one worker and mfu.
        """
        rate = self._batch_size / step_s
        elapsed_s = time.perf_counter() - self._began_s
        metrics = parts | {
            "step_s": step_s,
            "samples_per_s": rate,
            "data_share": parts.get("data_s", 0.0) / step_s,
            "sample_bytes": sample_bytes,
            "data_mb_per_s": rate * sample_bytes / MEGABYTE,
            "time_left_s": elapsed_s / (step + 1 - self._first) * (self._total - step - 1),
        }
        if self._load is not None:
            flops_per_s = rate * self._load.sample_flops / self._world_size
            metrics |= {"tflops_per_s": flops_per_s / 1e12, "mfu": flops_per_s / self._load.peak_flops}
        return metrics
