import dataclasses
import json
from pathlib import Path

import pytest
import torch

from jobs import cli
from jobs.rpo_rounds import Options, main
from models.policy import Policy
from pipelines.data.contracts import PAIRS
from pipelines.data.store import Dataset, read_manifest
from pipelines.errors import InputError, Refused
from tests.world_factory import write_policy, write_reward, write_world

IMPOSSIBLE = 1e6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    features = write_world(root / "features", {"rpo": 6, "val": 4})
    write_policy(root / "m0", features)
    write_reward(root / "reward", features)
    return root


def options(world: Path, out: Path, **changes: object) -> Options:
    words = {
        "policy": world / "m0",
        "reward": world / "reward",
        "features": world / "features",
        "out": out,
        "rounds": 2,
        "num-candidates": 2,
        "num-steps": 2,
        "guidance": 1.0,
        "margin": 0.0,
        "eval-candidates": 2,
        "steps": 2,
        "batch-size": 2,
        "lr": 1e-3,
        "warmup-steps": 0,
        "kappa": 5.0,
        "gate": "report",
        "num-workers": 0,
    }
    flags = [f"--{name}={value}" for name, value in words.items()]
    return dataclasses.replace(cli.parse("rpo_rounds", Options, flags), **changes)


@pytest.fixture(scope="module")
def launch(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished launch of two rounds with the control."""
    out = tmp_path_factory.mktemp("rpo") / "rpo"
    assert main(options(world, out, with_control=True)) == 0
    return out


def test_every_artifact_of_every_round_names_its_inputs(world: Path, launch: Path) -> None:
    policy = control = read_manifest(str(world / "m0"))["fingerprint"]
    for index in (0, 1):
        place = launch / f"round_{index}"
        names = ("pairs", "policy", "control", "scores", "verdict")
        found = {name: read_manifest(str(place / name)) for name in names}
        assert found["pairs"]["inputs"]["policy"] == policy
        assert found["policy"]["inputs"] == {"policy": policy, "pairs": found["pairs"]["fingerprint"]}
        assert found["control"]["inputs"] == {"policy": control, "pairs": found["pairs"]["fingerprint"]}
        assert found["control"]["objective"] == "winner_fm"
        assert found["scores"]["inputs"]["policy"] == found["policy"]["fingerprint"]
        assert found["verdict"]["inputs"]["after"] == found["scores"]["fingerprint"]
        assert set(Dataset.open(str(place / "pairs"), PAIRS).read(["round"])["round"].to_pylist()) == {index}
        policy, control = found["policy"]["fingerprint"], found["control"]["fingerprint"]
    assert read_manifest(str(launch))["final_policy"] == {"path": "round_1/policy", "fingerprint": policy}


def test_policy_and_control_took_different_ways_from_the_same_start(world: Path, launch: Path) -> None:
    def weights(place: Path) -> torch.Tensor:
        return torch.cat([p.flatten() for p in Policy.load(place).network.parameters()])

    start, policy, control = (weights(p) for p in (world / "m0", launch / "round_0/policy", launch / "round_0/control"))
    assert not torch.equal(start, policy)
    assert not torch.equal(start, control)
    assert not torch.equal(policy, control)
    assert (
        read_manifest(str(launch / "round_0/policy"))["config"]["seed"]
        == (read_manifest(str(launch / "round_0/control"))["config"]["seed"])
    )


def test_the_transform_of_the_latents_is_inherited_unchanged(world: Path, launch: Path) -> None:
    for name in ("round_0/policy", "round_1/policy", "round_1/control"):
        assert (launch / name / "transform.safetensors").read_bytes() == (
            (world / "m0" / "transform.safetensors").read_bytes()
        )


def test_the_verdict_gives_every_measure_before_and_after(launch: Path) -> None:
    content = json.loads((launch / "round_0/verdict/verdict.json").read_text())
    checks = {check["measure"]: check for check in content["checks"]}
    measured = {"reward", "fm_loss", "diversity", "f1", "class_f1", "log_mel_distance", "frechet_codec"}
    assert measured == set(checks)
    after = {
        c["measure"]: c["before"] for c in json.loads((launch / "round_1/verdict/verdict.json").read_text())["checks"]
    }
    assert {name: check["after"] for name, check in checks.items()} == after


def test_the_same_command_again_does_nothing(world: Path, launch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in launch.rglob("*") if path.is_file()}
    assert main(options(world, launch, with_control=True)) == 0
    assert "rpo_rounds: skip" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in launch.rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match="num_rounds"):
        main(options(world, launch, with_control=True, rounds=3))


def test_a_strict_gate_ends_the_launch_with_the_policy_before_each_time(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "rpo"
    for _ in range(2):
        with pytest.raises(Refused, match=r"round 0 was refused .*reward") as caught:
            main(options(world, out, gate="strict", min_reward_gain=IMPOSSIBLE))
        assert caught.value.exit_code == 4
    manifest = read_manifest(str(out))
    assert manifest["final_policy"]["path"] == str(world / "m0")
    assert manifest["stopped_at"] == 0
    assert (out / "round_0/policy/network.safetensors").exists()
    assert json.loads((out / "round_0/verdict/verdict.json").read_text())["verdict"] == "refused"
    assert not (out / "round_1").exists()


def test_margins_go_from_easy_to_hard_where_each_round_has_its_own(world: Path, launch: Path, tmp_path: Path) -> None:
    def margins(place: Path) -> list[float]:
        pairs = Dataset.open(str(place), PAIRS).read(["margin", "kept"])
        return sorted(row["margin"] for row in pairs.to_pylist() if row["kept"])

    *_, third, second, first = margins(launch / "round_0/pairs")
    least = (third + second) / 2
    main(options(world, tmp_path / "rpo", margin=(least, 0.0)))
    assert margins(tmp_path / "rpo/round_0/pairs") == [second, first]
    assert margins(tmp_path / "rpo/round_1/pairs")[0] < least


def test_a_dry_run_prints_plan_and_cost_and_touches_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rpo"
    assert main(options(world, out, with_control=True, dry_run=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"rpo_rounds: run, {out}"
    # 2 rounds x 6 clips + 3 evaluations x 4 clips; 2 candidates a clip; 2 network calls a clip; 2 x 2 x 2 steps
    assert "24 clips, 48 candidates, 24 sampler calls (48 network calls), 8 training steps" in lines[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_split": "test"}, "no clips of split 'test'"),
        ({"eval_split": "rpo"}, "--eval-split"),
        ({"split": "train"}, "no clips of split 'train'"),
        ({"eval_candidates": 1}, "--eval-candidates"),
        ({"rounds": 0}, "--rounds"),
        ({"margin": (4.0, 1.0, 0.0)}, "--margin has 3 numbers for --rounds 2"),
        ({"margin": (0.0, -1.0)}, "--margin"),
        ({"reward": "/nowhere"}, "/nowhere"),
    ],
)
def test_wrong_input_is_one_line_before_any_work(world: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        main(options(world, tmp_path / "rpo", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "rpo").exists()
