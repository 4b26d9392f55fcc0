"""Preference rounds as a fold: pairs_k = make_pairs(M_k); M_{k+1} = train(M_k, pairs_k); a verdict on M_{k+1}.

Nothing here remembers where it was: every step is a stage that skips, resumes or runs by what lies in its folder, so
the same command after a kill walks the same path. The steps come in from outside (`RoundStages`), which keeps the
order of things readable here and testable without models.

    out/baseline/scores        M_0 on the held-out split, fixed seeds
    out/baseline/codec         the real sounds of that split after the codec: what a policy can reach
    out/round_<k>/pairs        candidates of M_k, ranked, as pairs
    out/round_<k>/policy       M_{k+1}
    out/round_<k>/control      the equal-steps control, trained on from the last control, with --with-control
    out/round_<k>/scores       M_{k+1} on the held-out split, the same seeds
    out/round_<k>/verdict      verdict.json: accepted or refused, with reasons
    out/manifest.json          which policy came out, and the lineage of every round
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pipelines.data.storage import open_folder
from pipelines.data.store import MANIFEST, read_manifest
from pipelines.preferences.gate import GateMode, Verdict
from pipelines.stage import STARTED

Objective = Literal["dpo", "winner_fm"]
"""dpo: preference training; winner_fm: its control, the same pairs, order, steps and noise without preferences."""


class RoundStages(Protocol):
    """What a round is made of; every call is a stage that leaves a finished artifact at `out`."""

    def make_pairs(self, policy: str, round_index: int, out: str) -> None:
        """Sample candidates of `policy`, rank them, write pairs."""
        ...

    def train(self, policy: str, pairs: str, round_index: int, out: str, objective: Objective) -> None:
        """Train on from `policy` on the pairs of that round, write the next policy."""
        ...

    def evaluate(self, policy: str, out: str) -> None:
        """Score fresh samples of `policy` on the held-out split with the seeds of every other evaluation."""
        ...

    def evaluate_codec(self, out: str) -> None:
        """Score the real sounds of those clips after the codec."""
        ...

    def judge(self, before: str, after: str, codec: str, out: str) -> Verdict:
        """Compare two evaluations, each beside that of the codec, write the verdict."""
        ...


@dataclass(frozen=True, kw_only=True)
class RoundFolders:
    """Where the artifacts of one round lie."""

    pairs: str
    policy: str
    control: str
    scores: str
    verdict: str


def round_folders(out: str, round_index: int) -> RoundFolders:
    """The folders of one round of the launch at `out`."""
    base = f"{out}/round_{round_index}"
    return RoundFolders(
        pairs=f"{base}/pairs",
        policy=f"{base}/policy",
        control=f"{base}/control",
        scores=f"{base}/scores",
        verdict=f"{base}/verdict",
    )


def baseline_scores(out: str) -> str:
    """Where the evaluation of the launch's first policy lies."""
    return f"{out}/baseline/scores"


def codec_scores(out: str) -> str:
    """Where the evaluation of the real sounds after the codec lies."""
    return f"{out}/baseline/codec"


@dataclass(frozen=True, kw_only=True)
class FinishedRound:
    """One round that ran to its verdict."""

    index: int
    verdict: Verdict
    folders: RoundFolders


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What came out of the rounds."""

    final_policy: str
    """M_K, or M_k where a strict gate refused M_{k+1}, or the policy that went in."""
    final_control: str | None
    rounds: tuple[FinishedRound, ...]
    stopped_at: int | None
    """The round whose candidate a strict gate refused; its candidate stays on disk, marked by its verdict."""


def run_rounds(
    *, policy: str, out: str, num_rounds: int, gate: GateMode, with_control: bool, stages: RoundStages
) -> Launch:
    """Run `num_rounds` rounds from `policy`.

    The control starts where M_0 does and goes on from its own last state: in round k it sees the pairs of the main
    line, so that winners, order, steps and noise are equal and only the preference term differs.
    """
    current, control = policy, policy
    before, codec = baseline_scores(out), codec_scores(out)
    stages.evaluate(policy, before)
    stages.evaluate_codec(codec)
    finished: list[FinishedRound] = []
    stopped_at = None
    for index in range(num_rounds):
        folders = round_folders(out, index)
        stages.make_pairs(current, index, folders.pairs)
        stages.train(current, folders.pairs, index, folders.policy, "dpo")
        if with_control:
            stages.train(control, folders.pairs, index, folders.control, "winner_fm")
            control = folders.control
        stages.evaluate(folders.policy, folders.scores)
        verdict = stages.judge(before, folders.scores, codec, folders.verdict)
        finished.append(FinishedRound(index=index, verdict=verdict, folders=folders))
        if gate == "strict" and not verdict.accepted:
            stopped_at = index
            break
        current, before = folders.policy, folders.scores
    return Launch(
        final_policy=current,
        final_control=control if with_control else None,
        rounds=tuple(finished),
        stopped_at=stopped_at,
    )


def launch_manifest(launch: Launch, out: str, with_control: bool) -> dict[str, Any]:
    """Content of the launch's manifest: the final policy, and fingerprints and verdict of every round.

    Places inside the launch are written relative to it, so that the folder can be moved.
    """
    rounds = []
    for done in launch.rounds:
        places = {"pairs": done.folders.pairs, "policy": done.folders.policy, "scores": done.folders.scores}
        if with_control:
            places["control"] = done.folders.control
        fingerprints = {name: read_manifest(place)["fingerprint"] for name, place in places.items()}
        rounds.append({"round": done.index, "fingerprints": fingerprints, **done.verdict.to_json()})
    return {
        "kind": "rounds",
        "final_policy": _place(launch.final_policy, out),
        "final_control": None if launch.final_control is None else _place(launch.final_control, out),
        "stopped_at": launch.stopped_at,
        "rounds": rounds,
    }


def _place(location: str, out: str) -> dict[str, str]:
    return {
        "path": location.removeprefix(f"{out}/"),
        "fingerprint": read_manifest(location)["fingerprint"],
    }


@dataclass(frozen=True, kw_only=True)
class RoundCost:
    """What one round asks for, before anything has run; pairs that a filter drops make training no shorter."""

    clips: int
    """Clips that candidates are sampled for."""
    candidates: int
    network_calls: int
    """Evaluations of the network for one clip's batch of candidates."""
    training_steps: int
    evaluated_clips: int
    evaluated_candidates: int
    evaluation_network_calls: int


def plan_lines(*, out: str, num_rounds: int, with_control: bool, cost: RoundCost) -> list[str]:
    """What the launch would do, a line a stage with its state on disk, then the totals; touches nothing."""
    evaluation = (
        f"{cost.evaluated_clips} clips x {cost.evaluated_candidates} candidates, "
        f"{cost.evaluated_clips} sampler calls of {cost.evaluation_network_calls} network calls"
    )
    generation = (
        f"{cost.clips} clips x {cost.candidates} candidates, "
        f"{cost.clips} sampler calls of {cost.network_calls} network calls"
    )
    rows = [
        ("evaluate M_0", baseline_scores(out), evaluation),
        ("evaluate the codec", codec_scores(out), f"{cost.evaluated_clips} clips, the real sounds decoded"),
    ]
    for index in range(num_rounds):
        folders = round_folders(out, index)
        rows.append((f"round {index}: pairs from M_{index}", folders.pairs, generation))
        rows.append((f"round {index}: train M_{index + 1}", folders.policy, f"{cost.training_steps} steps"))
        if with_control:
            rows.append((f"round {index}: control", folders.control, f"{cost.training_steps} steps"))
        rows.append((f"round {index}: evaluate M_{index + 1}", folders.scores, evaluation))
        rows.append((f"round {index}: gate", folders.verdict, "compares two evaluations"))
    lines = [f"{name}: {_state(place)}, {what} -> {place}" for name, place, what in rows]
    return [*lines, _totals(num_rounds, with_control, cost)]


def _state(place: str) -> str:
    folder = open_folder(place)
    if folder.exists(MANIFEST):
        return "complete"
    return "to resume" if folder.exists(STARTED) else "to do"


def _totals(num_rounds: int, with_control: bool, cost: RoundCost) -> str:
    sampled = num_rounds * cost.clips
    evaluated = (num_rounds + 1) * cost.evaluated_clips
    steps = num_rounds * cost.training_steps * (2 if with_control else 1)
    candidates = sampled * cost.candidates + evaluated * cost.evaluated_candidates
    calls = sampled * cost.network_calls + evaluated * cost.evaluation_network_calls
    return (
        f"in all (done or not): {sampled + evaluated} clips, {candidates} candidates, {sampled + evaluated} sampler "
        f"calls ({calls} network calls), {steps} training steps"
    )


def refused_line(launch_rounds: Sequence[dict[str, Any]], stopped_at: int, final_policy: str) -> str:
    """One line for a launch that a strict gate stopped."""
    reasons = "; ".join(launch_rounds[stopped_at]["reasons"])
    return (
        f"round {stopped_at} was refused ({reasons}); the launch returns {final_policy} and leaves the candidate in "
        f"round_{stopped_at}/policy, marked by its verdict.json; --gate report with a new --out goes on regardless"
    )
