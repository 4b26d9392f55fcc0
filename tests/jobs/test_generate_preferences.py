import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs import cli
from jobs.generate_preferences import Options, main
from models.policy import Policy
from models.reward import Reward
from models.weights import load_config, save_config
from pipelines.data.contracts import FEATURES, PAIRS
from pipelines.data.store import Dataset, files_manifest, read_manifest
from pipelines.data.tables import column_to_numpy
from pipelines.errors import InputError, Refused
from pipelines.preferences.candidates import ConditionRow, Sampling, sample_candidates
from pipelines.stage import StageContext, run_stage
from tests.world_factory import write_policy, write_reward, write_world

NUM_CLIPS = 18
SPOILT = "rpo_004"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    features = write_world(root / "features", {"rpo": NUM_CLIPS, "val": 4, "train": 3}, spoilt=(SPOILT,))
    write_policy(root / "m0", features)
    write_reward(root / "reward", features)
    return root


def options(world: Path, out: Path, **changes: object) -> Options:
    words = {
        "policy": world / "m0",
        "reward": world / "reward",
        "features": world / "features",
        "out": out,
        "num-candidates": 3,
        "num-steps": 2,
        "guidance": 1.0,
        "margin": 0.1,
        "num-workers": 0,
        "max-reject-rate": 0.2,
    }
    return dataclasses.replace(
        cli.parse("generate_preferences", Options, [f"--{name}={value}" for name, value in words.items()]), **changes
    )


@pytest.fixture(scope="module")
def pairs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "pairs"
    assert main(options(world, out)) == 0
    return out


def rows(out: Path) -> pa.Table:
    return Dataset.open(str(out), PAIRS).read()


def test_every_clip_is_kept_dropped_with_a_reason_or_rejected(pairs: Path) -> None:
    manifest = read_manifest(str(pairs))
    outcomes = manifest["outcomes"]
    table = rows(pairs)
    dropped = sum(count for name, count in outcomes.items() if name.startswith("dropped_"))
    assert outcomes["clips"] == NUM_CLIPS == outcomes["kept"] + dropped + outcomes["rejects"]
    assert outcomes["rejects"] == 1
    assert Dataset.open(str(pairs), PAIRS).read_rejects()["clip_id"].to_pylist() == [SPOILT]
    assert table["clip_id"].to_pylist() == [f"rpo_{i:03d}" for i in range(NUM_CLIPS) if f"rpo_{i:03d}" != SPOILT]
    assert [
        kept == (reason is None)
        for kept, reason in zip(table["kept"].to_pylist(), table["drop_reason"].to_pylist(), strict=True)
    ] == [True] * 17


def test_the_winner_is_the_stored_sound_and_the_loser_the_sampled_one_bit_for_bit(world: Path, pairs: Path) -> None:
    features = Dataset.open(str(world / "features"), FEATURES).read(split="rpo")
    policy = Policy.load(world / "m0")
    table = rows(pairs)
    place = {clip: index for index, clip in enumerate(features["clip_id"].to_pylist())}
    truth, winner, loser = (
        column_to_numpy(t[n]) for t, n in ((features, "latent_mean"), (table, "winner"), (table, "loser"))
    )
    conditions = [column_to_numpy(features[name]) for name in ("clip_features", "sync_features", "text_features")]
    for index, clip in enumerate(table["clip_id"].to_pylist()[:5]):
        at = place[clip]
        assert np.array_equal(winner[index], truth[at])
        row = ConditionRow(
            clip_features=conditions[0][at], sync_features=conditions[1][at], text_features=conditions[2][at]
        )
        again = sample_candidates(policy, row, table["seeds"][index].as_py(), Sampling(num_steps=2, guidance=1.0))
        which = int(table["loser_origin"][index].as_py().removeprefix("candidate_"))
        assert np.array_equal(loser[index], again[which].numpy())


def test_all_scores_are_kept_and_the_loser_is_the_lowest(pairs: Path) -> None:
    for row in rows(pairs).select(["rewards", "seeds", "loser_origin", "margin", "reward_ground_truth"]).to_pylist():
        assert len(row["rewards"]) == len(row["seeds"]) == 3
        totals = {f"candidate_{i}": entry["total"] for i, entry in enumerate(row["rewards"]) if entry is not None}
        assert row["loser_origin"] == min(totals, key=totals.__getitem__)
        assert row["margin"] == pytest.approx(row["reward_ground_truth"]["total"] - min(totals.values()), abs=1e-5)


def test_the_manifest_tells_lineage_and_what_the_reward_has_seen(world: Path, pairs: Path, tmp_path: Path) -> None:
    manifest = read_manifest(str(pairs))
    for role, place in (("policy", "m0"), ("reward", "reward"), ("features", "features")):
        assert manifest["inputs"][role] == read_manifest(str(world / place))["fingerprint"]
    assert set(rows(pairs)["policy"].to_pylist()) == {manifest["inputs"]["policy"]}
    assert manifest["reward_saw_clips"] is False
    main(options(world, tmp_path / "on_train", split="train", margin=0.0))
    assert read_manifest(str(tmp_path / "on_train"))["reward_saw_clips"] is True


def test_a_reward_that_was_trained_on_another_split_has_seen_the_clips_of_that_one(world: Path, tmp_path: Path) -> None:
    reward = str(write_reward(tmp_path / "reward", world / "features", train_split="rpo"))
    for split, saw in (("rpo", True), ("train", False)):
        out = tmp_path / split
        main(options(world, out, reward=reward, split=split, margin=0.0, max_clips=2, max_reject_rate=1.0))
        assert read_manifest(str(out))["reward_saw_clips"] is saw


def test_a_reward_of_other_parts_is_refused_before_any_clip_is_sampled(world: Path, tmp_path: Path) -> None:
    def body(context: StageContext) -> None:
        config = load_config(world / "reward" / "config.json", "sf_cavp")
        names = Reward.load(world / "reward").save(context.folder.local_path())
        save_config(context.folder.local_path() / "config.json", {k: v for k, v in config.items() if k != "parts"})
        context.finish({"kind": "checkpoint", "files": files_manifest(context.folder, names)})

    old = tmp_path / "old"
    run_stage(name="older_code", config={}, inputs={}, out=str(old), body=body, say=lambda line: None)
    with pytest.raises(InputError, match="calibrated for other parts than this code has; train it again"):
        main(options(world, tmp_path / "pairs", reward=str(old)))
    assert not (tmp_path / "pairs").exists()


def test_the_same_command_again_skips_and_other_settings_are_refused(
    world: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in pairs.rglob("*") if path.is_file()}
    assert main(options(world, pairs)) == 0
    assert "skip" in capsys.readouterr().out
    with pytest.raises(InputError, match="margin"):
        main(options(world, pairs, margin=0.2))
    assert {path: path.stat().st_mtime_ns for path in pairs.rglob("*") if path.is_file()} == before


@pytest.mark.ray
def test_two_workers_write_what_one_process_writes(world: Path, pairs: Path, tmp_path: Path, ray_cluster: None) -> None:
    main(options(world, tmp_path / "pairs", num_workers=2))
    ours, theirs = read_manifest(str(tmp_path / "pairs")), read_manifest(str(pairs))
    assert ours["digest"] == theirs["digest"]
    assert [part["sha256"] for part in ours["parts"]] == [part["sha256"] for part in theirs["parts"]]


def test_a_run_cut_after_a_unit_goes_on_to_the_same_digest(
    world: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pairs"
    generate, seen = Policy.generate, []

    def dying(self: Policy, *arguments: object) -> torch.Tensor:
        seen.append(1)
        if len(seen) == 17:
            raise KeyboardInterrupt
        return generate(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Policy, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        main(options(world, out))
    assert len(list((out / "data").glob("part-*.parquet"))) == 1
    assert not (out / "manifest.json").exists()
    monkeypatch.setattr(Policy, "generate", generate)
    assert main(options(world, out)) == 0
    assert read_manifest(str(out))["digest"] == read_manifest(str(pairs))["digest"]


def test_other_rounds_sample_other_clips_with_other_noise(world: Path, tmp_path: Path) -> None:
    tables = []
    for index in (0, 1):
        out = tmp_path / f"round_{index}"
        main(options(world, out, round=index, max_clips=5, margin=0.0, max_reject_rate=1.0))
        manifest = read_manifest(str(out))
        assert manifest["outcomes"]["clips"] == 5
        tables.append(rows(out))
    first, second = tables
    assert first["clip_id"].to_pylist() != second["clip_id"].to_pylist()
    assert not {s for row in first["seeds"].to_pylist() for s in row} & {
        s for row in second["seeds"].to_pylist() for s in row
    }
    assert set(second["round"].to_pylist()) == {1}


def test_distorted_losers_need_no_candidates_and_say_what_was_done(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "distorted"
    main(options(world, out, mode="mixed", mixture=("gt_vs_distorted=0.5", "best_vs_worst=0.5"), margin=0.0))
    for row in rows(out).select(["winner_origin", "loser_origin", "rewards", "seeds"]).to_pylist():
        if row["winner_origin"] == "ground_truth":
            assert row["loser_origin"].startswith("distorted_")
            assert row["rewards"] == row["seeds"] == []
        else:
            assert row["winner_origin"] != row["loser_origin"]
            assert len(row["rewards"]) == 3
    origins = set(rows(out)["winner_origin"].to_pylist())
    assert "ground_truth" in origins
    assert len(origins) > 1


def test_no_kept_pair_is_a_refusal_each_time_and_the_scores_stay(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "none"
    for _ in range(2):
        with pytest.raises(Refused, match="none of 18 pairs was kept"):
            main(options(world, out, margin=1e6))
    table = rows(out)
    assert not any(table["kept"].to_pylist())
    assert all(len(entry) == 3 for entry in table["rewards"].to_pylist())
    assert set(table["drop_reason"].to_pylist()) <= {"margin", "gt_below_loser"}


def test_too_many_rejects_are_a_refusal(world: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"--max-reject-rate 0\.05"):
        main(options(world, tmp_path / "pairs", max_reject_rate=0.05))


def test_few_kept_pairs_are_a_warning(
    world: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    margins = sorted(m for m in rows(pairs)["margin"].to_pylist())
    main(options(world, tmp_path / "pairs", margin=float(np.float32(margins[-2]))))
    assert "warning: only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, "no clips of split 'test'"),
        ({"policy": "/nowhere"}, "/nowhere"),
        ({"num_candidates": 0}, "--num-candidates"),
        ({"num_candidates": 1, "mode": "best_vs_worst"}, "--num-candidates"),
        ({"margin": -1.0}, "--margin"),
        ({"mode": "mixed", "mixture": ("gt_vs_worst=0.3",)}, "--mixture"),
    ],
)
def test_wrong_input_is_one_line_before_any_work(world: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        main(options(world, tmp_path / "pairs", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize(("role", "given"), [("policy", "reward"), ("reward", "m0")])
def test_a_checkpoint_of_the_other_kind_is_refused(world: Path, tmp_path: Path, role: str, given: str) -> None:
    with pytest.raises(InputError, match=f"is not a {role}"):
        main(options(world, tmp_path / "pairs", **{role: str(world / given)}))
    assert not (tmp_path / "pairs").exists()


def test_a_constant_reward_gives_no_pair(world: Path, tmp_path: Path) -> None:
    flat = Path(shutil.copytree(world / "reward", tmp_path / "flat"))
    config = json.loads((flat / "config.json").read_text())
    config["calibration"] |= {"semantic_weight": 0.0, "temporal_weight": 0.0}
    (flat / "config.json").write_text(json.dumps(config))
    manifest = json.loads((flat / "manifest.json").read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "config.json"]
    (flat / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Refused, match="tie 17"):
        main(options(world, tmp_path / "pairs", reward=str(flat), margin=0.0))
