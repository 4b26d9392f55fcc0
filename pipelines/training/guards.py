"""Which steps are too far out to be applied: a gradient norm or loss many times what has been usual lately.

One broken batch can undo days of training although its loss is finite. The usual value is the median of the last
applied steps, which a few outliers do not move; what is above a factor of it is skipped, and never enters the window.
The median and not a high quantile, since it needs few values: the guard stands after `MIN_HISTORY` applied steps. In
quiet runs of 500 steps (flow matching, tiny) no gradient norm was above 2.9 times it and no loss above 1.3 times, so a
factor of 5 leaves such runs alone.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

WINDOW = 128
"""Applied steps that the median is taken over."""
MIN_HISTORY = 16
"""Applied steps before anything is a spike: the first ones of a training have no usual value yet."""
LOSS, GRAD_NORM = "loss", "grad_norm"


@dataclass
class SpikeGuard:
    """The windows of loss and gradient norm; values are means over all ranks, so every rank decides the same."""

    factor: float | None
    """How many times the median is a spike; None: nothing is."""
    recent: dict[str, list[float]] = field(default_factory=lambda: {LOSS: [], GRAD_NORM: []})
    """Of the last applied steps, oldest first; part of a checkpoint, so that a resumed run decides as it would have."""

    def is_spike(self, name: str, value: float) -> bool:
        """Whether `value` of LOSS or GRAD_NORM is above the factor of a positive median; not finite is not for us."""
        window = self.recent[name]
        if self.factor is None or len(window) < MIN_HISTORY:
            return False
        usual = statistics.median(window)
        return usual > 0 and value > self.factor * usual

    def accept(self, values: Mapping[str, float]) -> None:
        """Take the LOSS and GRAD_NORM of an applied step into the windows; nothing where the guard is off."""
        if self.factor is None:
            return
        for name, window in self.recent.items():
            window.append(values[name])
            del window[:-WINDOW]
