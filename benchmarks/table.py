"""What every benchmark prints: the machine, a table, and on request the same as JSON."""

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from pipelines.evaluation.tables import align


def machine() -> str:
    """Processor, cores and Python, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.processor()
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def show(
    title: str,
    rows: Sequence[Mapping[str, object]],
    json_path: str | None,
    more: Mapping[str, object] | None = None,
) -> None:
    """Print rows as an aligned table under the machine's name; write them to `json_path` when there is one.

    The file also says the day and torch's version, and holds what `more` adds.
    """
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    sys.stdout.write("\n".join([f"{title} ({machine()})", *align(cells)]) + "\n")
    if json_path is not None:
        content = {
            "title": title,
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "machine": machine(),
            "torch": version("torch"),
            "rows": [dict(row) for row in rows],
            **(more or {}),
        }
        Path(json_path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
