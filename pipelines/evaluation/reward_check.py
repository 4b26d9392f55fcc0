"""May this reward rank sounds? Its acceptance gates on a split, as a stage that leaves a report.

Six gates of SF-CAVP's specification. Those on real pairs need the reward alone; those that decide whether it can rank,
the correlation with the independent score among candidates of one clip and the Best-of-N curve, need an evaluation of
a policy with several candidates, and the share of clips on which the real sound wins needs one of the real sound.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from models.reward import Reward
from pipelines.clip_stage import fingerprint_of_reward
from pipelines.data.contracts import FEATURES
from pipelines.data.pictures import require_pictures
from pipelines.data.store import CHECKPOINT, Dataset, files_manifest, open_files, open_local_files, read_manifest
from pipelines.errors import InputError
from pipelines.evaluation.evaluate import read_scores
from pipelines.evaluation.gates import Gate, GateReport, ground_truth_shares, measure
from pipelines.evaluation.ranking_quality import best_of_n, within_clip_correlation
from pipelines.evaluation.real_pairs import real_pairs
from pipelines.evaluation.scores import ClipScores, check_same_clips
from pipelines.evaluation.tables import align
from pipelines.stage import Outcome, StageContext, run_stage

STAGE = "check_reward"
KIND = "gates"
GATES, TABLE = "gates.json", "gates.txt"
BON_MEANING = "Best-of-N by the reward beside the oracle's"


@dataclass(frozen=True, kw_only=True)
class CheckInputs:
    """The artifacts a check reads."""

    reward: str
    features: str
    scores: str | None = None
    """An evaluation of a policy on the split with at least two candidates a clip."""
    truth_scores: str | None = None
    """An evaluation of the real sound through the codec on the same clips."""


def check_reward(
    inputs: CheckInputs,
    *,
    split: str,
    out: str,
    options_yaml: str | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Write `gates.json` and `gates.txt` at `out`.

    Raises:
        InputError: an input is missing, the split has fewer than two usable clips, or the evaluation has one
            candidate a clip.
    """
    features = Dataset.open(inputs.features, FEATURES)
    require_pictures(features, (split,), "the reward")
    fingerprints = {"features": features.fingerprint, "reward": fingerprint_of_reward(inputs.reward)}
    for name, place in (("scores", inputs.scores), ("truth_scores", inputs.truth_scores)):
        if place is not None:
            fingerprints[name] = read_manifest(place, kind="dataset")["fingerprint"]
    scores = None if inputs.scores is None else _candidates(inputs.scores)

    def body(context: StageContext) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reward = Reward.load(open_local_files(inputs.reward, CHECKPOINT)[0], device)
        pairs = ((frames.to(device), wave.to(device), rate) for frames, wave, rate in real_pairs(features, split))
        try:
            report = measure(reward, pairs)
        except ValueError as error:
            raise InputError(f"{features.folder.uri}, split '{split}': {error}") from error
        content: dict[str, Any] = report.to_json()
        lines = gate_lines(report)
        if scores is not None:
            ranking = ranking_gates(scores, inputs.truth_scores)
            content["ranking"] = ranking
            lines += ["", BON_MEANING, *align([[name, _text(value)] for name, value in ranking.items()])]
        values = {f"gate/{gate.name}": gate.value for gate in report.gates}
        ranked = {k: float(v) for k, v in content.get("ranking", {}).items() if isinstance(v, int | float)}
        context.tracker.metrics(0, {**values, **ranked})
        context.folder.write_bytes(GATES, (json.dumps(content, indent=1) + "\n").encode())
        context.folder.write_bytes(TABLE, ("\n".join(lines) + "\n").encode())
        context.finish({"kind": KIND, "files": files_manifest(context.folder, [GATES, TABLE])})

    return run_stage(
        name=STAGE, config={"split": split}, inputs=fingerprints, out=out, body=body, options_yaml=options_yaml, say=say
    )


def read_gates(location: str) -> dict[str, Any]:
    """The content of `gates.json` of a finished check."""
    folder, _ = open_files(location, KIND)
    return json.loads(folder.read_bytes(GATES))


def ranking_gates(scores: ClipScores, truth_location: str | None) -> dict[str, Any]:
    """Whether the reward ranks candidates of the same clip: correlation, Best-of-N, and how often the real sound wins.

    `reward_within_clip_rho` is the mean over clips of Spearman's rho between reward and independent score.
    """
    rho = within_clip_correlation(scores)
    found: dict[str, Any] = {
        "reward_within_clip_rho": float(np.nanmean(rho)) if np.isfinite(rho).any() else None,
        "clips_with_rho": int(np.isfinite(rho).sum()),
    }
    found |= best_of_n(scores).to_json()
    if truth_location is not None:
        truth = read_scores(truth_location)[0]
        check_same_clips({"scores": scores, "truth_scores": truth})
        above_worst, above_best = ground_truth_shares(truth.values["reward"], scores.candidates["total"])
        found |= {"truth_above_worst": above_worst, "truth_above_best": above_best}
        # Real sound through the codec; far below 0, the mean of real pairs, the reward hears the codec.
        found["inverted_truth_reward"] = float(np.nanmean(truth.values["reward"]))
    return found


def gate_lines(report: GateReport) -> list[str]:
    """The gates as an aligned table."""
    rows = [["gate", "value", "bar", "verdict"]]
    rows += [[gate.name, f"{gate.value:.3f}", _bar(gate), _verdict(gate)] for gate in report.gates]
    return [f"{report.num_clips} clips, {report.num_unusable} unusable", *align(rows)]


def _bar(gate: Gate) -> str:
    return "" if gate.bar is None else f"{'<=' if gate.at_most else '>='} {gate.bar:g}"


def _verdict(gate: Gate) -> str:
    return "" if gate.bar is None else "passed" if gate.passed else "FAILED"


def _text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _candidates(location: str) -> ClipScores:
    scores = read_scores(location)[0]
    if scores.num_candidates < 2:
        raise InputError(f"{location} has one candidate a clip, nothing to rank; evaluate with --num-candidates 5")
    return scores
