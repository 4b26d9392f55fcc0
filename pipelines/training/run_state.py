"""What a checkpoint of a training remembers besides weights and optimizer."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """JSON values, as `training.json` holds them."""

    step: int = 0
    samples: int = 0
    skipped_steps: int = 0
    bad_run: int = 0
    """Skipped steps in a row, up to now."""
    skipped_spikes: int = 0
    """Of the skipped steps those in which everything was finite."""
    recent: dict[str, list[float]] = field(default_factory=dict)
    """The windows of `SpikeGuard`; empty where it is off."""
    adjustments: dict[str, Any] = field(default_factory=dict)
    """`Adjustments.to_json()`."""
    num_average_updates: int = 0
    last_validation: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None
    notes: list[str] = field(default_factory=list)
    watch: dict[str, float] = field(default_factory=dict)
