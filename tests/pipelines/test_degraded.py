"""The stage degrade: every clip accounted for, sounds that get worse from version to version, and no lie about them."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.codec import build_codec
from models.policy import Policy
from models.spec import SPECS
from pipelines.data.contracts import DEGRADED, FEATURES
from pipelines.data.media_write import decode_flac
from pipelines.data.store import Dataset, read_manifest
from pipelines.data.tables import column_to_numpy
from pipelines.data.units import Pool
from pipelines.errors import InputError, Refused, StageConflict
from pipelines.preferences.candidates import ConditionRow, Sampling, seeded_noise
from pipelines.preferences.degraded import DegradeInputs, DegradeSettings, degrade
from tests.demo_factory import write_checkpoint, write_untrained_policy
from tests.world_factory import write_policy, write_world

NUM_CLIPS = 7
SPOILT = "train_004"
SETTINGS = DegradeSettings(
    num_versions=3,
    starts=(0.1, 0.7),
    blind=False,
    sampling=Sampling(num_steps=2, guidance=1.5),
    seed=0,
    max_clips=None,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> DegradeInputs:
    """Clips and a policy that says nothing: what is noised stays as it was noised."""
    root = tmp_path_factory.mktemp("degrade")
    features = write_world(root / "features", {"train": NUM_CLIPS, "val": 2}, spoilt=(SPOILT,))
    return DegradeInputs(policy=str(write_policy(root / "m0", features)), features=str(features), split="train")


def run(
    inputs: DegradeInputs,
    out: Path,
    settings: DegradeSettings = SETTINGS,
    *,
    num_workers: int = 0,
    max_reject_rate: float = 0.2,
) -> str:
    pool = Pool(num_workers=num_workers)
    return degrade(inputs, settings, out=str(out), pool=pool, max_reject_rate=max_reject_rate, say=lambda line: None)


@pytest.fixture(scope="module")
def made(inputs: DegradeInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "degraded"
    assert run(inputs, out) == "run"
    return out


def test_every_clip_is_a_row_or_a_reject(made: Path) -> None:
    dataset = Dataset.open(str(made), DEGRADED)
    every = [f"train_{index:03d}" for index in range(NUM_CLIPS)]
    assert dataset.read()["clip_id"].to_pylist() == [clip for clip in every if clip != SPOILT]
    assert dataset.read_rejects().select(["clip_id", "stage", "reason"]).to_pylist() == [
        {"clip_id": SPOILT, "stage": "degrade", "reason": "not_media"}
    ]
    assert {name: dataset.manifest["counts"][name] for name in ("in", "rejected")} == {"in": NUM_CLIPS, "rejected": 1}


def test_each_third_has_a_start_and_the_earlier_ones_come_later(made: Path) -> None:
    starts = np.array(Dataset.open(str(made), DEGRADED).read(["starts"])["starts"].to_pylist())
    thirds = 0.1 + 0.6 * np.array([[2, 3], [1, 2], [0, 1]]) / 3
    assert starts.shape == (NUM_CLIPS - 1, 3)
    assert (starts >= thirds[:, 0] - 1e-6).all()
    assert (starts <= thirds[:, 1] + 1e-6).all()
    assert len(np.unique(starts)) == starts.size


def test_a_row_holds_the_real_sound_and_its_versions_through_the_same_codec(inputs: DegradeInputs, made: Path) -> None:
    """Everything is made again from what the row says: starts, seeds, policy."""
    rows, features = (
        Dataset.open(str(made), DEGRADED).read(),
        Dataset.open(inputs.features, FEATURES).read(split="train"),
    )
    policy, codec, spec = Policy.load(Path(inputs.policy)), build_codec("tiny"), SPECS["tiny"]
    place = {clip: index for index, clip in enumerate(features["clip_id"].to_pylist())}
    conditions = {name: column_to_numpy(features[name]) for name in ("clip_features", "sync_features", "text_features")}
    latents = column_to_numpy(features["latent_mean"])
    for index in (0, 5):
        row = rows.select(["clip_id", "frames", "audio", "worse", "starts", "seeds"]).to_pylist()[index]
        at = place[row["clip_id"]]
        truth = torch.from_numpy(np.array(latents[at]))[None]
        assert np.array_equal(column_to_numpy(rows["latent_mean"])[index], latents[at])
        assert row["frames"] == features["frames"][at].as_py()
        versions = policy.regenerate(
            *ConditionRow(**{name: column[at] for name, column in conditions.items()}).tensors(),
            truth,
            seeded_noise(row["seeds"], policy.noise_shape(1)[1:]),
            torch.tensor(row["starts"]),
            num_steps=2,
            guidance=1.5,
        )
        for flac, sound in zip((row["audio"], *row["worse"]), torch.cat([truth, versions]), strict=True):
            stored = decode_flac(flac)
            assert stored.shape == (spec.num_samples,)
            np.testing.assert_allclose(stored, codec.decode(sound[None])[0].numpy(), atol=2e-3)


def test_versions_are_further_from_the_truth_the_earlier_they_start(made: Path) -> None:
    rows, codec = Dataset.open(str(made), DEGRADED).read(["audio", "worse"]).to_pylist(), build_codec("tiny")
    distances = []
    for row in rows:
        sounds = np.stack([decode_flac(flac) for flac in (row["audio"], *row["worse"])])
        mels = codec.encode(torch.from_numpy(sounds))[0]
        distances.append((mels[1:] - mels[:1]).abs().mean(dim=(1, 2)).tolist())
    means = np.mean(distances, axis=0)
    assert 0 < means[0] < means[1] < means[2]


def test_a_blind_policy_makes_the_same_of_a_sound_whatever_the_picture_shows(
    inputs: DegradeInputs, made: Path, tmp_path: Path
) -> None:
    run(inputs, tmp_path / "blind", replace(SETTINGS, blind=True))
    seeing, blind = (Dataset.open(str(out), DEGRADED).read() for out in (made, tmp_path / "blind"))
    assert blind["audio"].to_pylist() == seeing["audio"].to_pylist()
    assert blind["starts"].to_pylist() == seeing["starts"].to_pylist()
    # Untrained output layers would hide the difference: `test_policy` has a policy that listens to its conditions.
    assert read_manifest(str(tmp_path / "blind"))["config"]["blind"] is True


def test_the_manifest_tells_where_it_comes_from(inputs: DegradeInputs, made: Path) -> None:
    manifest = read_manifest(str(made))
    policy = read_manifest(inputs.policy)["fingerprint"]
    assert manifest["inputs"] == {"policy": policy, "features": read_manifest(inputs.features)["fingerprint"]}
    assert (manifest["config"]["split"], manifest["num_versions"]) == ("train", 3)
    assert set(Dataset.open(str(made), DEGRADED).read(["policy"])["policy"].to_pylist()) == {policy}


def test_the_same_command_again_skips_and_other_settings_are_refused(inputs: DegradeInputs, made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    assert run(inputs, made) == "skip"
    with pytest.raises(StageConflict, match="seed: 0 there, 1 asked"):
        run(inputs, made, replace(SETTINGS, seed=1))
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.ray
def test_two_ray_workers_write_what_one_process_writes(
    inputs: DegradeInputs, tmp_path: Path, ray_cluster: None
) -> None:
    features = write_world(tmp_path / "features", {"train": 18})  # more than one unit
    many = replace(inputs, features=str(features))
    for name, num_workers in (("here", 0), ("ray", 2)):
        run(many, tmp_path / name, num_workers=num_workers)
    ours, theirs = read_manifest(str(tmp_path / "ray")), read_manifest(str(tmp_path / "here"))
    assert len(theirs["parts"]) == 2
    assert ours["digest"] == theirs["digest"]
    assert [part["sha256"] for part in ours["parts"]] == [part["sha256"] for part in theirs["parts"]]


def test_a_sample_of_the_clips_is_seeded_and_makes_the_rows_of_the_whole(
    inputs: DegradeInputs, made: Path, tmp_path: Path
) -> None:
    def row_of(out: Path) -> dict[str, list[bytes]]:
        rows = Dataset.open(str(out), DEGRADED).read(["clip_id", "worse"]).to_pylist()
        return {row["clip_id"]: row["worse"] for row in rows}

    run(inputs, tmp_path / "few", replace(SETTINGS, max_clips=2), max_reject_rate=1.0)
    few, whole = row_of(tmp_path / "few"), row_of(made)
    assert 1 <= len(few) <= 2
    assert few == {clip: whole[clip] for clip in few}


def test_a_policy_that_emits_nonsense_leaves_rejects_and_a_refusal(inputs: DegradeInputs, tmp_path: Path) -> None:
    policy = Policy.load(write_untrained_policy(tmp_path / "whole"))
    with torch.no_grad():
        next(policy.network.parameters()).fill_(math.nan)
    broken = replace(inputs, policy=str(write_checkpoint(tmp_path / "broken", policy, {"nan": True})), split="val")
    for _ in range(2):
        with pytest.raises(Refused, match=r"2 of 2 clips were rejected, more than --max-reject-rate 0\.2") as caught:
            run(broken, tmp_path / "out")
        assert caught.value.exit_code == 4
    rejects = Dataset.open(str(tmp_path / "out"), DEGRADED).read_rejects().to_pylist()
    assert [reject["reason"] for reject in rejects] == ["nonfinite"] * 2


def test_what_cannot_be_done_is_said_before_any_work(inputs: DegradeInputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"no clips of split 'rpo', only .*name one with --split"):
        run(replace(inputs, split="rpo"), out)
    with pytest.raises(InputError, match="nothing does not exist"):
        run(replace(inputs, policy=str(tmp_path / "nothing")), out)
    with pytest.raises(InputError, match="expected a checkpoint"):
        run(replace(inputs, policy=inputs.features), out)
    assert not out.exists()
    for changes in ({"num_versions": 0}, {"max_clips": 0}, {"sampling": Sampling(num_steps=0, guidance=1.0)}):
        with pytest.raises(InputError, match="must be at least 1"):
            replace(SETTINGS, **changes)
    for starts in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(InputError, match="--starts: two times"):
            replace(SETTINGS, starts=starts)
