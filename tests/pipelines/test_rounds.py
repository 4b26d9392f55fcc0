import json
from pathlib import Path

import pytest

from pipelines.data.store import read_manifest
from pipelines.preferences.gate import GateLimits, Verdict, judge
from pipelines.preferences.rounds import (
    Launch,
    RoundCost,
    codec_scores,
    launch_manifest,
    plan_lines,
    round_folders,
    run_rounds,
)
from pipelines.stage import StageContext, run_stage

MEASURES = {"fm_loss": 0.5, "diversity": 0.2}
COST = RoundCost(
    clips=512,
    candidates=4,
    network_calls=8,
    training_steps=150,
    evaluated_clips=256,
    evaluated_candidates=4,
    evaluation_network_calls=8,
)


class Recorded:
    """Stages that write small real artifacts, remember what was asked and done, and may be killed before a call."""

    def __init__(self, refused_rounds: tuple[int, ...] = (), die_before: int = -1) -> None:
        self.refused_rounds = refused_rounds
        self.die_before = die_before
        self.asked: list[tuple[str, ...]] = []
        self.done: list[str] = []

    def _stage(self, name: str, out: str, inputs: dict[str, str]) -> None:
        if len(self.asked) == self.die_before:
            raise KeyboardInterrupt
        self.asked.append((name, out, *inputs.values()))

        def body(context: StageContext) -> None:
            self.done.append(out)
            context.finish({"kind": name, "files": []})

        fingerprints = {role: read_manifest(place)["fingerprint"] for role, place in inputs.items()}
        run_stage(name=name, config={}, inputs=fingerprints, out=out, body=body, say=lambda line: None)

    def make_pairs(self, policy: str, round_index: int, out: str) -> None:
        self._stage(f"pairs_{round_index}", out, {"policy": policy})

    def train(self, policy: str, pairs: str, round_index: int, out: str, objective: str) -> None:
        self._stage(objective, out, {"policy": policy, "pairs": pairs})

    def evaluate(self, policy: str, out: str) -> None:
        self._stage("evaluate", out, {"policy": policy})

    def evaluate_codec(self, out: str) -> None:
        self._stage("evaluate_codec", out, {})

    def judge(self, before: str, after: str, codec: str, out: str) -> Verdict:
        self._stage("judge", out, {"before": before, "after": after, "codec": codec})
        refused = any(f"round_{k}/" in after for k in self.refused_rounds)
        return judge({"reward": 1.0, **MEASURES}, {"reward": 0.9 if refused else 1.1, **MEASURES}, GateLimits())


@pytest.fixture
def policy(tmp_path: Path) -> str:
    place = str(tmp_path / "m0")

    def body(context: StageContext) -> None:
        context.finish({"kind": "policy", "files": []})

    run_stage(name="m0", config={}, inputs={}, out=place, body=body, say=lambda line: None)
    return place


def launch(policy: str, out: Path, stages: Recorded, **changes: object) -> Launch:
    options = {"num_rounds": 2, "gate": "strict", "with_control": False, **changes}
    return run_rounds(policy=policy, out=str(out), stages=stages, **options)  # type: ignore[arg-type]


def test_each_round_samples_from_and_trains_on_from_the_policy_before(policy: str, tmp_path: Path) -> None:
    out, stages = tmp_path / "rpo", Recorded()
    result = launch(policy, out, stages)
    first, second = round_folders(str(out), 0), round_folders(str(out), 1)
    baseline, codec = f"{out}/baseline/scores", codec_scores(str(out))
    assert stages.asked == [
        ("evaluate", baseline, policy),
        ("evaluate_codec", codec),
        ("pairs_0", first.pairs, policy),
        ("dpo", first.policy, policy, first.pairs),
        ("evaluate", first.scores, first.policy),
        ("judge", first.verdict, baseline, first.scores, codec),
        ("pairs_1", second.pairs, first.policy),
        ("dpo", second.policy, first.policy, second.pairs),
        ("evaluate", second.scores, second.policy),
        ("judge", second.verdict, first.scores, second.scores, codec),
    ]
    assert result.final_policy == second.policy
    assert result.stopped_at is None


def test_the_control_goes_on_from_itself_on_the_pairs_of_the_main_line(policy: str, tmp_path: Path) -> None:
    out, stages = tmp_path / "rpo", Recorded()
    result = launch(policy, out, stages, with_control=True)
    first, second = round_folders(str(out), 0), round_folders(str(out), 1)
    assert [asked for asked in stages.asked if asked[0] == "winner_fm"] == [
        ("winner_fm", first.control, policy, first.pairs),
        ("winner_fm", second.control, first.control, second.pairs),
    ]
    assert result.final_control == second.control


def test_a_strict_gate_stops_the_launch_and_returns_the_policy_before(policy: str, tmp_path: Path) -> None:
    out = tmp_path / "rpo"
    result = launch(policy, out, Recorded(refused_rounds=(1,)), num_rounds=4)
    assert result.final_policy == round_folders(str(out), 0).policy
    assert result.stopped_at == 1
    assert read_manifest(round_folders(str(out), 1).policy)
    assert not Path(round_folders(str(out), 2).pairs).exists()


def test_a_strict_gate_may_refuse_the_very_first_candidate(policy: str, tmp_path: Path) -> None:
    result = launch(policy, tmp_path / "rpo", Recorded(refused_rounds=(0,)))
    assert result.final_policy == policy
    content = launch_manifest(result, str(tmp_path / "rpo"), with_control=False)
    assert content["final_policy"] == {"path": policy, "fingerprint": read_manifest(policy)["fingerprint"]}
    assert content["rounds"][0]["verdict"] == "refused"


def test_a_reporting_gate_records_and_goes_on(policy: str, tmp_path: Path) -> None:
    out = tmp_path / "rpo"
    result = launch(policy, out, Recorded(refused_rounds=(0,)), gate="report")
    assert result.final_policy == round_folders(str(out), 1).policy
    assert [done.verdict.accepted for done in result.rounds] == [False, True]


@pytest.mark.parametrize("die_before", range(12))
def test_a_launch_cut_between_any_two_stages_does_the_rest_and_only_the_rest(
    policy: str, tmp_path: Path, die_before: int
) -> None:
    out = tmp_path / "rpo"
    first, second = Recorded(die_before=die_before), Recorded()
    with pytest.raises(KeyboardInterrupt):
        launch(policy, out, first, with_control=True)
    result = launch(policy, out, second, with_control=True)
    assert len(first.done) == die_before
    assert len(first.done) + len(second.done) == 12
    assert not set(first.done) & set(second.done)
    assert result.final_policy == round_folders(str(out), 1).policy


def test_the_manifest_names_the_lineage_of_every_round_and_survives_a_move(policy: str, tmp_path: Path) -> None:
    out = tmp_path / "rpo"
    result = launch(policy, out, Recorded(), with_control=True)
    content = json.loads(json.dumps(launch_manifest(result, str(out), with_control=True)))
    assert content["final_policy"]["path"] == "round_1/policy"
    assert content["final_control"]["path"] == "round_1/control"
    for index, entry in enumerate(content["rounds"]):
        folders = round_folders(str(out), index)
        for name in ("pairs", "policy", "control", "scores"):
            assert entry["fingerprints"][name] == read_manifest(getattr(folders, name))["fingerprint"]


def test_the_plan_counts_and_touches_nothing(policy: str, tmp_path: Path) -> None:
    out = tmp_path / "rpo"
    lines = plan_lines(out=str(out), num_rounds=2, with_control=True, cost=COST)
    assert len(lines) == 2 + 2 * 5 + 1
    assert all("to do" in line for line in lines[:-1])
    # 2 x 512 clips for pairs and 3 x 256 for evaluations; 4 candidates each, 8 network calls a clip; 2 x 2 x 150 steps
    assert "1792 clips, 7168 candidates, 1792 sampler calls (14336 network calls), 600 training steps" in lines[-1]
    assert not out.exists()


def test_the_plan_of_a_cut_launch_tells_what_is_left(policy: str, tmp_path: Path) -> None:
    out = tmp_path / "rpo"
    with pytest.raises(KeyboardInterrupt):
        launch(policy, out, Recorded(die_before=4))
    Path(round_folders(str(out), 0).scores).mkdir(parents=True)
    Path(round_folders(str(out), 0).scores, "stage.json").write_text("{}")
    states = [
        line.split(": ")[-1].split(",")[0]
        for line in plan_lines(out=str(out), num_rounds=1, with_control=False, cost=COST)[:-1]
    ]
    assert states == ["complete", "complete", "complete", "complete", "to resume", "to do"]
