"""What may be mixed and in which shares; who needs pictures refuses rows without them; a training on a mixture."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from jobs import cli, train_mmdit
from pipelines.curation.measure import measure
from pipelines.curation.report import ReportSettings
from pipelines.data.contracts import FEATURES
from pipelines.data.store import Dataset, open_files
from pipelines.data.units import HERE
from pipelines.errors import InputError, StageConflict
from pipelines.evaluation.evaluate import EvaluationInputs, evaluate
from pipelines.evaluation.reward_check import CheckInputs, check_reward
from pipelines.evaluation.subjects import EvaluationSettings
from pipelines.preferences.candidates import Sampling
from pipelines.preferences.generation import PairInputs, check_inputs
from pipelines.tracking import SilentTracker
from pipelines.training.flow_matching_objective import MixMember
from pipelines.training.journal import read_journal
from pipelines.training.mixture import MAX_WEIGHT, mix_datasets
from pipelines.training.options import TrainingOptions
from pipelines.training.stages import Launching, train_sf_cavp
from pipelines.training.stages import train_mmdit as train
from tests.feature_factory import write_features

SAID: list[str] = []
LAUNCHING = Launching(num_workers=0, track=lambda context: SilentTracker(), say=SAID.append)
OPTIONS = TrainingOptions(steps=2, batch_size=4, lr=1e-3, checkpoint_every=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """videos/ of 20 + 4 rows; words/ of 6 + 4 without video; more/ of 10 rows to train on."""
    folder = tmp_path_factory.mktemp("mixture")
    write_features(folder / "videos", {"train": 20, "val": 4})
    write_features(folder / "words", {"train": 6, "val": 4}, seed=1, has_video=False, prefix="w_")
    write_features(folder / "more", {"train": 10}, seed=2, prefix="m_")
    return folder


def opened(root: Path, *names: str) -> list[Dataset]:
    return [Dataset.open(str(root / name), FEATURES) for name in names]


def test_without_weights_every_row_comes_equally_often_and_weights_lose_their_common_divisor(root: Path) -> None:
    assert mix_datasets(opened(root, "videos", "words", "more"), None, "train").weights == (10, 3, 5)
    mixture = mix_datasets(opened(root, "videos", "words", "more"), (10, 2, 2), "train")
    assert mixture.affecting_bytes == {"mix": [5, 1, 1]}
    assert list(mixture.inputs) == ["features", "features_2", "features_3"]
    assert [member["without_video"] for member in mixture.lineage["mixture"]] == [0, 6, 0]
    assert mixture.members("val") == (
        MixMember(features=str(root / "videos"), weight=5, has_validation=True),
        MixMember(features=str(root / "words"), weight=1, has_validation=True),
        MixMember(features=str(root / "more"), weight=1, has_validation=False),
    )
    alone = mix_datasets(opened(root, "videos"), None, "train")
    assert (alone.inputs, alone.affecting_bytes, alone.lineage) == ({"features": alone.first.fingerprint}, {}, {})
    assert alone.members("val") == str(root / "videos")


def test_what_cannot_be_mixed_is_one_clear_line(root: Path, tmp_path: Path) -> None:
    for weights, line in (
        ((1,), "1 weights of --mix for 2 datasets"),
        ((1, 0), "--mix 1 0: weights are whole numbers from 1"),
        ((1, MAX_WEIGHT + 1), f"whole numbers from 1 to {MAX_WEIGHT}"),
    ):
        with pytest.raises(InputError, match=line):
            mix_datasets(opened(root, "videos", "words"), weights, "train")
    with pytest.raises(InputError, match="are the same dataset; raise its weight"):
        mix_datasets(opened(root, "videos", "videos"), None, "train")
    write_features(tmp_path / "other", {"train": 4}, seed=3)
    manifest = tmp_path / "other" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"frozen": {"clip": "0" * 64}}))
    other = Dataset.open(str(tmp_path / "other"), FEATURES)
    with pytest.raises(InputError, match=r"encoded by other networks \(clip\)"):
        mix_datasets([*opened(root, "videos"), other], None, "train")

    def refused(line: str, *names: str) -> None:
        places = [str(root / name) for name in names]
        with pytest.raises(InputError, match=line):
            train(features=places, out=str(tmp_path / "x"), size="tiny", options=OPTIONS, launching=LAUNCHING)

    refused("has no clip with video in split 'train'.* name a dataset with video first", "words", "videos")
    with pytest.raises(InputError, match="--mix has 1 weights; give one a dataset"):
        cli.parse("train_mmdit", train_mmdit.Options, ["--features", "/a", "/b", "--mix", "5", "--out=/o"])
    assert not (tmp_path / "x").exists()


def test_the_options_of_a_mixture_parse_back_equal() -> None:
    words = ["--features", "/a", "/b", "--mix", "5", "1", "--out=/o"]
    options = cli.parse("train_mmdit", train_mmdit.Options, words)
    assert (options.features, options.mix) == (("/a", "/b"), (5, 1))
    section = cli.yaml.safe_load(cli.to_yaml("train_mmdit", options))["train_mmdit"]
    assert cli.parse("train_mmdit", train_mmdit.Options, cli.flatten(section)) == options


def _train_mixture(root: Path, out: Path, mix: tuple[int, ...], launching: Launching = LAUNCHING) -> str:
    places = [str(root / name) for name in ("videos", "words", "more")]
    return train(features=places, mix=mix, out=str(out), size="tiny", options=OPTIONS, launching=launching)


def test_a_training_on_a_mixture_names_its_datasets_and_validates_on_all_of_them(root: Path, tmp_path: Path) -> None:
    SAID.clear()
    assert _train_mixture(root, tmp_path / "m0", (4, 2, 2)) == "run"
    assert sum("a training sample reads" in line for line in SAID) == 3
    _, manifest = open_files(str(tmp_path / "m0"), "checkpoint")
    named = [(Path(member["features"]).name, member["weight"]) for member in manifest["mixture"]]
    assert named == [("videos", 2), ("words", 1), ("more", 1)]
    assert manifest["inputs"] == {
        "features": opened(root, "videos")[0].fingerprint,
        "features_2": opened(root, "words")[0].fingerprint,
        "features_3": opened(root, "more")[0].fingerprint,
    }
    assert manifest["metrics"]["val_loss"] > 0
    # The same shares in other words are the same training, other shares are not.
    assert _train_mixture(root, tmp_path / "m0", (2, 1, 1)) == "skip"
    with pytest.raises(StageConflict, match=r"mix: \[2, 1, 1\] there, \[1, 1, 1\] asked"):
        _train_mixture(root, tmp_path / "m0", (1, 1, 1))


@pytest.mark.slow
def test_a_training_on_a_mixture_goes_on_as_if_it_had_not_stopped(root: Path, tmp_path: Path) -> None:
    class Stopping(SilentTracker):
        def metrics(self, step: int, values: Mapping[str, float]) -> None:
            if step == 2:
                raise KeyboardInterrupt

    stopping = Launching(num_workers=0, track=lambda context: Stopping(), say=SAID.append)
    with pytest.raises(KeyboardInterrupt):
        _train_mixture(root, tmp_path / "stopped", (2, 1, 1), stopping)
    assert _train_mixture(root, tmp_path / "stopped", (2, 1, 1)) == "resume"
    assert _train_mixture(root, tmp_path / "whole", (2, 1, 1)) == "run"
    ends = [tmp_path / name for name in ("stopped", "whole")]
    stopped, whole = ([record["loss"] for record in read_journal(end / "metrics.jsonl")] for end in ends)
    assert stopped == whole
    assert (ends[0] / "network.safetensors").read_bytes() == (ends[1] / "network.safetensors").read_bytes()


def _evaluate(features: str, out: str) -> None:
    settings = EvaluationSettings(
        subject="ground_truth",
        split="train",
        seed=0,
        num_candidates=1,
        sampling=Sampling(num_steps=1, guidance=1.0),
        max_clips=None,
    )
    evaluate(EvaluationInputs(features=features, reward="/r", policy=None), settings, out=out, pool=HERE)


def _generate_pairs(features: str, out: str) -> None:
    inputs = PairInputs(policy="/p", reward="/r", features=features, split="train")
    check_inputs(inputs, Dataset.open(features, FEATURES))


def _measure(features: str, out: str) -> None:
    measure(features, "/r", out=out, pool=HERE, report=ReportSettings())


def _check_reward(features: str, out: str) -> None:
    check_reward(CheckInputs(reward="/r", features=features), split="train", out=out)


def _train_sf_cavp(features: str, out: str) -> None:
    train_sf_cavp(features=features, out=out, size="tiny", options=OPTIONS, launching=LAUNCHING)


@pytest.mark.parametrize("needs_pictures", [_evaluate, _generate_pairs, _measure, _check_reward, _train_sf_cavp])
def test_who_needs_pictures_refuses_rows_without_video_before_anything_else(
    needs_pictures: Callable[[str, str], None], root: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"(6 of 6|10 of 10) clips.* have no video.*without --audio-only") as caught:
        needs_pictures(str(root / "words"), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
