"""train_mmdit and train_sf_cavp as stages, on real rendered clips."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.policy import Policy
from models.preference import PreferenceLossConfig
from models.reward import Reward
from models.sf_cavp_views import LOSS_CONFIGS
from models.weights import load_weights
from pipelines.data.contracts import DEGRADED, FEATURES
from pipelines.data.store import Dataset, open_files
from pipelines.data.tables import column_to_numpy
from pipelines.errors import InputError, StageConflict
from pipelines.evaluation.real_pairs import real_pairs
from pipelines.tracking import SilentTracker
from pipelines.training.journal import read_journal
from pipelines.training.objective import Batch, Gather
from pipelines.training.options import Execution, LoRA, TrainingOptions
from pipelines.training.sf_cavp_objective import SFCAVPTrainee, decode_pictures
from pipelines.training.stages import Launching, train_mmdit, train_rpo, train_sf_cavp
from tests.feature_factory import write_features, write_pairs
from tests.world_factory import write_degraded, write_policy, write_world

LAUNCHING = Launching(num_workers=0, track=lambda context: SilentTracker(), say=lambda line: None)
FEW = TrainingOptions(steps=2, batch_size=4, lr=1e-3, checkpoint_every=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_world(tmp_path_factory.mktemp("world") / "features", {"train": 40, "val": 8}))


@pytest.fixture(scope="module")
def policy(world: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("policy") / "m0")
    assert train_mmdit(features=world, out=out, size="tiny", options=FEW, launching=LAUNCHING) == "run"
    return out


def test_the_transform_is_fitted_on_the_training_split_and_saved_with_the_weights(world: str, policy: str) -> None:
    folder, manifest = open_files(policy, "checkpoint")
    loaded = Policy.load(folder.local_path())
    train = Dataset.open(world, FEATURES).read(["latent_mean"], split="train")
    latents = loaded.transform.normalize(torch.from_numpy(np.array(column_to_numpy(train["latent_mean"]))))
    tokens = latents.flatten(0, 1)
    torch.testing.assert_close(tokens.mean(dim=0), torch.zeros(32), atol=1e-3, rtol=0)
    covariance = tokens.T.cov()
    assert float(covariance.diagonal().mean()) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(covariance, covariance.diagonal().diag(), atol=0.02, rtol=0)
    assert manifest["size"] == "tiny"
    assert manifest["inputs"] == {"features": Dataset.open(world, FEATURES).fingerprint}
    assert manifest["metrics"]["val_loss"] > 0
    assert not (Path(policy) / "checkpoints").exists()


def test_init_starts_from_a_policy_and_inherits_its_transform(world: str, policy: str, tmp_path: Path) -> None:
    out = tmp_path / "m0b"
    train_mmdit(features=world, out=str(out), size="tiny", options=FEW, launching=LAUNCHING, init=policy)
    first = read_journal(out / "metrics.jsonl")[0]["loss"]
    fresh = read_journal(Path(policy) / "metrics.jsonl")[0]["loss"]
    assert first != fresh
    for name in ("transform.safetensors",):
        assert (out / name).read_bytes() == (Path(policy) / name).read_bytes()
    inputs = open_files(str(out), "checkpoint")[1]["inputs"]
    assert inputs["init"] == open_files(policy, "checkpoint")[1]["fingerprint"]


@pytest.mark.parametrize("kind", ["sf_cavp", "mmdit", "rpo"])
def test_bf16_trains_every_objective_near_its_float32_losses_and_keeps_float32_weights(
    world: str, policy: str, tmp_path: Path, kind: str
) -> None:
    losses: dict[bool, list[float]] = {}
    for bf16 in (False, True):
        out, options = tmp_path / f"bf16_{bf16}", replace(FEW, steps=3, bf16=bf16)
        if kind == "sf_cavp":
            train_sf_cavp(features=world, out=str(out), size="tiny", options=options, launching=LAUNCHING)
        elif kind == "mmdit":
            train_mmdit(features=world, out=str(out), size="tiny", options=options, launching=LAUNCHING)
        else:
            pairs = str(tmp_path / "pairs")
            if not bf16:
                write_pairs(Path(pairs), 16, 2)
            loss = PreferenceLossConfig(kappa=5.0, divide_by_kappa=True)
            train_rpo(policy=policy, pairs=pairs, out=str(out), options=options, loss=loss, launching=LAUNCHING)
        records = read_journal(out / "metrics.jsonl")
        assert [record["skipped"] for record in records] == [0, 0, 0]
        losses[bf16] = [float(record["loss"] or 0) for record in records]
        for path in out.glob("*.safetensors"):
            assert {value.dtype for value in load_weights(path).values()} == {torch.float32}
    assert losses[True] != losses[False]
    assert losses[True][0] == pytest.approx(losses[False][0], rel=0.01)
    # Adam's first steps are nearly signs of gradients, so what bf16 rounds away grows from step to step.
    assert losses[True] == pytest.approx(losses[False], rel=0.10)


def test_other_options_on_the_same_folder_are_refused_and_other_intervals_are_not(world: str, policy: str) -> None:
    other = TrainingOptions(steps=2, batch_size=4, lr=2e-3)
    with pytest.raises(StageConflict, match=r"lr: 0.001 there, 0.002 asked"):
        train_mmdit(features=world, out=policy, size="tiny", options=other, launching=LAUNCHING)
    intervals = TrainingOptions(steps=2, batch_size=4, lr=1e-3, checkpoint_every=50, keep_last=5)
    assert train_mmdit(features=world, out=policy, size="tiny", options=intervals, launching=LAUNCHING) == "skip"


def test_wrong_inputs_are_one_clear_line(world: str, policy: str, tmp_path: Path) -> None:
    def mmdit(**changes: object) -> None:
        arguments = {"features": world, "out": str(tmp_path / "x"), "size": "tiny", "options": FEW}
        train_mmdit(**{**arguments, "launching": LAUNCHING, **changes})  # pyright: ignore[reportArgumentType]

    with pytest.raises(InputError, match="--size huge: known sizes are tiny"):
        mmdit(size="huge")
    with pytest.raises(InputError, match=r"spec 'tiny', 2.5 s; this size needs '16k', 8"):
        mmdit(size="small_16k")
    with pytest.raises(InputError, match="no clips of split 'rpo'"):
        mmdit(train_split="rpo")
    with pytest.raises(InputError, match="does not exist or is empty"):
        mmdit(features=str(tmp_path / "nothing"))
    pairs = write_pairs(tmp_path / "pairs", num_kept=4, num_dropped=0)
    with pytest.raises(InputError, match="expected a checkpoint"):
        mmdit(init=str(pairs))
    assert not (tmp_path / "x").exists()


def test_adapters_of_a_stage_are_part_of_its_fingerprint_and_how_the_network_is_run_is_not(
    world: str, policy: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")

    def tune(lora: LoRA | None, execution: Execution) -> str:
        launching = replace(LAUNCHING, execution=execution)
        return train_mmdit(
            features=world, out=out, size="tiny", options=FEW, launching=launching, init=policy, lora=lora
        )

    assert tune(LoRA(rank=2, alpha=2.0), Execution()) == "run"
    folder, manifest = open_files(out, "checkpoint")
    assert (manifest["config"]["lora_rank"], manifest["config"]["lora_alpha"]) == (2, 2.0)
    start, tuned = (load_weights(place / "network.safetensors") for place in (Path(policy), folder.local_path()))
    assert start.keys() == tuned.keys()
    assert torch.equal(start["empty_clip_feat"], tuned["empty_clip_feat"])
    assert not torch.equal(start["final_layer.conv.weight"], tuned["final_layer.conv.weight"])
    assert tune(LoRA(rank=2, alpha=2.0), Execution(activation_checkpointing=True, compile=True)) == "skip"
    with pytest.raises(StageConflict, match="lora_rank: 2 there, 3 asked"):
        tune(LoRA(rank=3, alpha=2.0), Execution())
    with pytest.raises(StageConflict, match="lora_rank: 2 there, null asked"):
        tune(None, Execution())


def test_the_next_training_takes_a_policy_made_by_adapters_like_any_other(
    world: str, policy: str, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs", 8, 0)
    places = [policy]
    for name in ("first", "second"):
        train_rpo(
            policy=places[-1],
            pairs=str(pairs),
            out=str(tmp_path / name),
            options=FEW,
            loss=PreferenceLossConfig(kappa=5.0, divide_by_kappa=True),
            launching=LAUNCHING,
            lora=LoRA(rank=2, alpha=2.0),
        )
        places.append(str(tmp_path / name))
        assert read_journal(tmp_path / name / "metrics.jsonl")[0]["implicit_accuracy"] == 0.5
    weights = [load_weights(Path(place) / "network.safetensors")["final_layer.conv.weight"] for place in places]
    assert not torch.equal(weights[1], weights[0])
    assert not torch.equal(weights[2], weights[1])


def test_adapters_from_nothing_are_one_clear_line(world: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--lora-rank 4 trains adapters beside a trained policy: give it with --init"):
        train_mmdit(
            features=world,
            out=str(tmp_path / "x"),
            size="tiny",
            options=FEW,
            launching=LAUNCHING,
            lora=LoRA(rank=4, alpha=4.0),
        )
    assert not (tmp_path / "x").exists()


def test_sf_cavp_comes_out_calibrated_with_its_gates(world: str, tmp_path: Path) -> None:
    out = tmp_path / "cavp"
    options = TrainingOptions(steps=3, batch_size=8, lr=2e-3, checkpoint_every=2, ema_decay=0.9)
    train_sf_cavp(features=world, out=str(out), size="tiny", options=options, launching=LAUNCHING)
    folder, manifest = open_files(str(out), "checkpoint")
    assert [entry["path"] for entry in manifest["files"]] == ["config.json", "gates.json", "sf_cavp.safetensors"]
    reward = Reward.load(folder.local_path())
    assert reward.calibration.num_pairs == 8
    totals = []
    for frames, wave, rate_hz in real_pairs(Dataset.open(world, FEATURES), "val"):
        totals += [score.total for score in reward.score(reward.video_features(frames), wave, rate_hz)]
    # Calibrated on these very pairs, so R is zero on average.
    assert float(np.mean(totals)) == pytest.approx(0, abs=1e-3)
    assert float(reward.model.mel_std.min()) > 0.01
    assert not torch.equal(reward.model.mel_mean, torch.zeros_like(reward.model.mel_mean))
    gates = json.loads((out / "gates.json").read_text())
    assert manifest["config"]["split"] == "train"
    assert "gate_r1_v2a" in manifest["metrics"]
    assert gates


@pytest.fixture(scope="module")
def degraded(world: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("degraded")
    policy = write_policy(root / "policy", Path(world))
    return str(write_degraded(root / "degraded", Path(world), policy, max_clips=4))


@pytest.mark.slow
def test_sf_cavp_cut_in_the_middle_learns_from_degraded_sounds_as_if_uninterrupted(
    world: str, degraded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Easy samples, of which a run of a few steps has no others, ignore degraded sounds.
    monkeypatch.setitem(LOSS_CONFIGS, "tiny", replace(LOSS_CONFIGS["tiny"], easy_samples=0))
    options = replace(FEW, steps=4, batch_size=8)

    def train(name: str, degraded: str | None) -> str:
        out = str(tmp_path / name)
        return train_sf_cavp(
            features=world, out=out, size="tiny", options=options, launching=LAUNCHING, degraded=degraded
        )

    train("plain", None)
    train("whole", degraded)
    forward, steps = SFCAVPTrainee.forward, []

    def dying(self: SFCAVPTrainee, batch: Batch, gather: Gather) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        steps.append(batch["is_degraded"].sum().item())
        if len(steps) == 4:
            raise KeyboardInterrupt
        return forward(self, batch, gather)

    with monkeypatch.context() as cut:
        cut.setattr(SFCAVPTrainee, "forward", dying)
        with pytest.raises(KeyboardInterrupt):
            train("cut", degraded)
    # Of every four samples one.
    assert steps == [2, 2, 2, 2]
    assert not (tmp_path / "cut" / "manifest.json").exists()
    assert train("cut", degraded) == "resume"
    losses = {
        name: [record["loss"] for record in read_journal(tmp_path / name / "metrics.jsonl")]
        for name in ("plain", "whole", "cut")
    }
    assert losses["cut"] == losses["whole"] != losses["plain"]
    weights = [(tmp_path / name / "sf_cavp.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]
    manifest = open_files(str(tmp_path / "whole"), "checkpoint")[1]
    assert manifest["inputs"]["degraded"] == Dataset.open(degraded, DEGRADED).fingerprint
    assert manifest["config"]["degraded_every"] == 4
    assert "degraded_every" not in open_files(str(tmp_path / "plain"), "checkpoint")[1]["config"]


def test_degraded_sounds_that_do_not_fit_are_one_clear_line(world: str, degraded: str, tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "policy", Path(world))
    other = write_world(tmp_path / "features", {"train": 2})

    def train(degraded: object, every: int = 4) -> None:
        train_sf_cavp(
            features=world,
            out=str(tmp_path / "x"),
            size="tiny",
            options=FEW,
            launching=LAUNCHING,
            degraded=str(degraded),
            degraded_every=every,
        )

    with pytest.raises(InputError, match=r"has 2 versions a clip, SF-CAVP of size tiny takes 3: .*--num-versions 3"):
        train(write_degraded(tmp_path / "two", Path(world), policy, num_versions=2, max_clips=1))
    with pytest.raises(InputError, match="made of split 'val', and the training is on split 'train'"):
        train(write_degraded(tmp_path / "val", Path(world), policy, split="val", max_clips=1))
    with pytest.raises(InputError, match="made of other features"):
        train(write_degraded(tmp_path / "other", other, policy, max_clips=1))
    with pytest.raises(InputError, match="--degraded-every must be at least 2, got 1"):
        train(degraded, every=1)
    with pytest.raises(InputError, match="features"):
        train(world)
    with pytest.raises(InputError, match="does not exist or is empty"):
        train(tmp_path / "nothing")
    assert not (tmp_path / "x").exists()


def test_frames_are_decoded_to_the_same_pixels_as_elsewhere(world: str) -> None:
    from pipelines.data.frames import decode_frames

    jpegs = Dataset.open(world, FEATURES).read(["frames"], split="val")["frames"][0].as_py()
    assert np.array_equal(decode_pictures(jpegs).permute(0, 2, 3, 1).numpy(), decode_frames(jpegs))


def test_features_whose_frames_are_no_pictures_end_in_a_contract_error(tmp_path: Path) -> None:
    features = str(write_features(tmp_path / "features", {"train": 8, "val": 8}))
    with pytest.raises(Exception, match=r"JPEG|FLAC|flac|sound"):
        train_sf_cavp(features=features, out=str(tmp_path / "x"), size="tiny", options=FEW, launching=LAUNCHING)


def test_pairs_that_were_all_dropped_are_an_input_error(world: str, policy: str, tmp_path: Path) -> None:
    from models.preference import PreferenceLossConfig

    pairs = write_pairs(tmp_path / "pairs", num_kept=0, num_dropped=2)
    with pytest.raises(InputError, match="no row to use"):
        train_rpo(
            policy=policy,
            pairs=str(pairs),
            out=str(tmp_path / "out"),
            options=FEW,
            loss=PreferenceLossConfig(kappa=5.0),
            launching=LAUNCHING,
        )
