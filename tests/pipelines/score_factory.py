"""Score rows with chosen numbers, for tests of what is made from scores."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from models.spec import SPECS
from pipelines.data.contracts import SCORES
from pipelines.data.tables import table_from_rows


def candidate(
    total: float | None = 0.0,
    detected: int | None = None,
    matched: int | None = None,
    class_matched: int | None = None,
    mel_distance: float = 0.2,
) -> dict:
    """One candidate; `total` None is a sound that the reward refused."""
    return {
        "seed": 1,
        "total": total,
        "semantic": None if total is None else total / 2,
        "temporal": None if total is None else total / 4,
        "num_detected": detected,
        "num_matched": matched,
        "num_class_matched": class_matched,
        "mel_distance": mel_distance,
    }


def score_row(
    clip_id: str,
    candidates: Sequence[dict],
    num_events: int | None = None,
    statistics: Sequence[float] = (0.0, 0.0),
    truth_statistics: Sequence[float] = (0.0, 0.0),
    diversity: float | None = None,
) -> dict:
    """The row whose own sound is the first of its candidates."""
    own = candidates[0]
    reward = None if own["total"] is None else {k: own[k] for k in ("total", "semantic", "temporal")}
    return {
        "clip_id": clip_id,
        "split": "test",
        "seed": own["seed"],
        "reward": reward,
        "offset_s": None if reward is None else 0.0,
        "invalid_reason": "silent" if reward is None else None,
        "num_events": num_events,
        "num_detected": own["num_detected"],
        "num_matched": own["num_matched"],
        "num_class_matched": own["num_class_matched"],
        "mel_distance": own["mel_distance"],
        "statistics": list(statistics),
        "truth_statistics": list(truth_statistics),
        "diversity": diversity,
        "fm_loss": None,
        "candidates": list(candidates),
        "audio": b"fLaC",
    }


def score_table(rows: Sequence[dict]) -> pa.Table:
    """A conforming scores table."""
    return table_from_rows(rows, SCORES, SPECS["tiny"])


def random_rows(num_clips: int, num_candidates: int, seed: int, skill: float) -> list[dict]:
    """Rows of a model that finds each of 4 events with probability `skill`; the reward sees it with noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_clips):
        found = rng.binomial(4, skill, num_candidates)
        candidates = [candidate(float(k + rng.normal(0, 0.5)), 4, int(k), int(k), float(0.5 - 0.1 * k)) for k in found]
        truth = np.random.default_rng(i).normal(size=3)
        rows.append(
            score_row(
                f"clip_{i:03d}",
                candidates,
                num_events=4,
                statistics=truth + rng.normal(0, 1 - skill, 3),
                truth_statistics=truth,
                diversity=float(rng.random()),
            )
        )
    return rows
