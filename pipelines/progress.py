"""Progress of long work: a bar on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Counts rows towards a total; use as a context manager."""

    def __init__(self, *, label: str, total: int, done: int = 0) -> None:
        self._label = label
        self._total = total
        self._done = done
        self._first = done
        self._started = time.monotonic()
        self._last_line = self._started
        self._bar = tqdm(total=total, initial=done, desc=label, unit="row") if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def start_at(self, done: int) -> None:
        """Take `done` rows as there before this started: the rate is that of what comes after."""
        self._done = self._first = done
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._total)
            self._bar.initial = self._bar.n = done
            self._bar.last_print_n = done

    def advance(self, count: int) -> None:
        """Count `count` more rows."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def _line(self) -> None:
        now = time.monotonic()
        self._last_line = now
        rate = (self._done - self._first) / max(now - self._started, 1e-9)
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate > 0 else ""
        sys.stderr.write(f"{self._label}: {self._done}/{self._total} ({rate:.1f}/s{left})\n")
        sys.stderr.flush()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._done > self._first:
            self._line()
