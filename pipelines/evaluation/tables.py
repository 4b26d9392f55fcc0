"""The score table as plain text: what a terminal and a log show, with the same numbers as `summary.json`."""

from collections.abc import Sequence

from pipelines.evaluation.bootstrap import Estimate
from pipelines.evaluation.ranking_quality import BestOfN
from pipelines.evaluation.summary import Metric, Summary

ARROWS = {"up": "^", "down": "v"}


def plain_text(summary: Summary) -> str:
    """One block of values with their 95 % intervals, one of paired differences from the baseline."""
    header = ["subject", "invalid", *(f"{m.title} {ARROWS[m.better]}" for m in summary.metrics)]
    rows = [
        [label, str(summary.num_invalid[label]), *(_cell(summary.estimates[label], m) for m in summary.metrics)]
        for label in summary.labels
    ]
    lines = [f"{summary.num_clips} clips; value [95 % interval over clips]; ^ more is better, v less is better"]
    lines += align([header, *rows])
    if summary.differences:
        lines += ["", f"difference from {summary.baseline}, paired by clip; * = the interval leaves out zero"]
        difference_rows = [
            [label, *(_difference_cell(values, m) for m in summary.metrics)]
            for label, values in summary.differences.items()
        ]
        lines += align([["subject", *header[2:]], *difference_rows])
    lines += ["", *summary.cautions] if summary.cautions else []
    return "\n".join(lines) + "\n"


def best_of_n_text(label: str, curve: BestOfN) -> str:
    """The Best-of-N curve of one subject."""
    rows = [["n", "picked by the reward", "picked by the score itself"]]
    rows += [[str(n), number(e), number(curve.oracle[n])] for n, e in curve.picked.items()]
    return "\n".join([f"Best of n candidates of {label}, {curve.score}", *align(rows)]) + "\n"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells -> lines with aligned columns: the first to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def number(estimate: Estimate) -> str:
    """`0.742 [0.711, 0.770]`."""
    return f"{estimate.value:z.3f} [{estimate.lo:z.3f}, {estimate.hi:z.3f}]"


def is_clear(estimate: Estimate) -> bool:
    """Whether the interval of a difference leaves out zero."""
    return estimate.lo > 0 or estimate.hi < 0


def _cell(values: dict[str, Estimate], metric: Metric) -> str:
    return number(values[metric.name]) if metric.name in values else "-"


def _difference_cell(values: dict[str, Estimate], metric: Metric) -> str:
    if metric.name not in values:
        return "-"
    estimate = values[metric.name]
    mark = "*" if is_clear(estimate) else " "
    return f"{estimate.value:+z.3f} [{estimate.lo:+z.3f}, {estimate.hi:+z.3f}]{mark}"
