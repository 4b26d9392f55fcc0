"""Evaluation: the same question for every model, measures that agree with known answers, and a stage that resumes."""

import io
import math
import wave as wave_file
from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from models.policy import Policy
from models.spec import SPECS
from pipelines.data.contracts import FEATURES, SCORES
from pipelines.data.demo_world import render_clip
from pipelines.data.media_write import decode_flac
from pipelines.data.store import Dataset
from pipelines.data.tables import table_from_rows
from pipelines.data.units import HERE, Pool
from pipelines.errors import InputError, Refused
from pipelines.evaluation.evaluate import EvaluationInputs, evaluate, measures, read_scores
from pipelines.evaluation.show_scores import SHOWN_CLIPS
from pipelines.evaluation.subjects import EvaluationSettings, Subject
from pipelines.preferences.candidates import Sampling
from pipelines.tracking import Figure, SilentTracker
from tests.demo_factory import (
    demo_row,
    write_checkpoint,
    write_demo_features,
    write_untrained_policy,
    write_untrained_reward,
)
from tests.feature_factory import write_dataset

NUM_CLIPS = 18
"""More than one unit."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> EvaluationInputs:
    root = tmp_path_factory.mktemp("evaluate")
    return EvaluationInputs(
        features=str(write_demo_features(root / "features", {"test": NUM_CLIPS})),
        reward=str(write_untrained_reward(root / "reward")),
        policy=str(write_untrained_policy(root / "policy")),
    )


def run(
    inputs: EvaluationInputs, out: Path, subject: Subject = "policy", *, num_workers: int = 0, **changes: int
) -> Dataset:
    settings = {"seed": 0, "num_candidates": 1, **changes}
    evaluate(
        inputs,
        EvaluationSettings(
            subject=subject,
            split="test",
            sampling=Sampling(num_steps=2, guidance=1.0),
            max_clips=settings.pop("max_clips", None),
            **settings,
        ),
        out=str(out),
        pool=Pool(num_workers=num_workers),
        say=lambda line: None,
    )
    return Dataset.open(str(out), SCORES)


def test_the_detector_hears_the_real_sound_before_and_after_the_codec(inputs: EvaluationInputs, tmp_path: Path) -> None:
    for subject in ("ground_truth", "inverted"):
        run(inputs, tmp_path / subject, subject)
        found = measures(str(tmp_path / subject))
        assert found["f1"] >= 0.97
        assert found["class_f1"] >= 0.95
        assert found["log_mel_distance"] < 3.0
        assert "fm_loss" not in found
        assert "diversity" not in found
    assert measures(str(tmp_path / "ground_truth"))["log_mel_distance"] == 0.0
    assert measures(str(tmp_path / "ground_truth"))["frechet"] == pytest.approx(0.0, abs=1e-6)
    beside = {name: measures(str(tmp_path / name), str(tmp_path / "inverted")) for name in ("ground_truth", "inverted")}
    assert beside["inverted"]["frechet_codec"] == pytest.approx(0.0, abs=1e-6)
    assert beside["ground_truth"]["frechet_codec"] > 0.1


def test_an_untrained_policy_is_scored_on_every_clip_with_all_its_candidates(
    inputs: EvaluationInputs, tmp_path: Path
) -> None:
    dataset = run(inputs, tmp_path / "out", num_candidates=3)
    assert dataset.num_rows("test") == NUM_CLIPS
    rows = dataset.read().to_pylist()
    events = {row["clip_id"]: row["events"] for row in Dataset.open(inputs.features, FEATURES).read().to_pylist()}
    for row in rows:
        assert len(row["candidates"]) == 3
        assert len({candidate["seed"] for candidate in row["candidates"]}) == 3
        assert row["seed"] == row["candidates"][0]["seed"]
        assert row["mel_distance"] == row["candidates"][0]["mel_distance"] > 0
        assert row["num_events"] == len(events[row["clip_id"]])
        assert row["diversity"] > 0
        assert row["fm_loss"] > 0
        assert decode_flac(row["audio"]).shape == (40_000,)
    found = measures(str(tmp_path / "out"))
    assert found["f1"] < 0.5
    assert found["reward"] == pytest.approx(
        np.mean([row["reward"]["total"] for row in rows if row["reward"] is not None]), abs=1e-5
    )


def test_two_models_get_the_same_noise_and_more_candidates_keep_the_first(
    inputs: EvaluationInputs, tmp_path: Path
) -> None:
    other = EvaluationInputs(
        features=inputs.features,
        reward=inputs.reward,
        policy=str(write_untrained_policy(tmp_path / "other", seed=1)),
    )

    def seeds(name: str, which: EvaluationInputs, **changes: int) -> list[tuple[str, int]]:
        table = run(which, tmp_path / name, **changes).read(["clip_id", "seed"])
        return list(zip(*table.to_pydict().values(), strict=True))

    first = seeds("a", inputs)
    assert len(set(first)) == NUM_CLIPS
    assert first == seeds("b", other) == seeds("c", inputs, num_candidates=2)
    assert first != seeds("d", inputs, seed=1)


def test_shuffled_conditions_change_the_sound_and_nothing_else(inputs: EvaluationInputs, tmp_path: Path) -> None:
    own = run(inputs, tmp_path / "own").read().to_pylist()
    shuffled = run(inputs, tmp_path / "shuffled", "shuffled").read().to_pylist()
    for a, b in zip(own, shuffled, strict=True):
        assert (a["clip_id"], a["seed"], a["num_events"]) == (b["clip_id"], b["seed"], b["num_events"])
        assert a["truth_statistics"] == b["truth_statistics"]
        assert a["audio"] != b["audio"]


def test_a_killed_evaluation_resumes_to_the_digest_of_an_uninterrupted_one(
    inputs: EvaluationInputs, tmp_path: Path
) -> None:
    whole = run(inputs, tmp_path / "whole")
    broken = tmp_path / "broken"
    run(inputs, broken)
    # What a kill after the first unit leaves: its part, no manifest.
    (broken / "manifest.json").unlink()
    lost = sorted((broken / "data").iterdir())[1]
    lost.unlink()
    kept = sorted((broken / "data").iterdir())[0]
    before = kept.stat().st_mtime_ns
    assert run(inputs, broken).digest == whole.digest
    assert kept.stat().st_mtime_ns == before
    assert lost.exists()


@pytest.mark.ray
def test_two_ray_workers_give_the_digest_of_this_process(
    inputs: EvaluationInputs, tmp_path: Path, ray_cluster: None
) -> None:
    here = run(inputs, tmp_path / "here", num_candidates=2)
    assert run(inputs, tmp_path / "ray", num_candidates=2, num_workers=2).digest == here.digest


def test_a_policy_that_emits_nonsense_is_scored_as_silence_and_not_dropped(
    inputs: EvaluationInputs, tmp_path: Path
) -> None:
    policy = Policy.load(write_untrained_policy(tmp_path / "whole", seed=2))
    with torch.no_grad():
        next(policy.network.parameters()).fill_(math.nan)
    broken = EvaluationInputs(
        features=inputs.features,
        reward=inputs.reward,
        policy=str(write_checkpoint(tmp_path / "broken", policy, {"nan": True})),
    )
    rows = run(broken, tmp_path / "scores", max_clips=3).read().to_pylist()
    assert len(rows) == 3
    for row in rows:
        assert row["invalid_reason"] == "nonfinite"
        assert row["reward"] is None
        assert row["num_detected"] == 0
        assert not decode_flac(row["audio"]).any()
    assert read_scores(str(tmp_path / "scores"))[0].num_invalid == 3


def test_a_clip_whose_stored_sound_is_damaged_becomes_a_reject(inputs: EvaluationInputs, tmp_path: Path) -> None:
    rows = [demo_row(f"clip_{i}", "test", render_clip(0, i)) for i in range(3)]
    rows[1]["audio"] = b"fLaC and nothing"
    table = table_from_rows(rows, FEATURES, SPECS["tiny"])
    features = write_dataset(tmp_path / "features", FEATURES, {"test": table}, {"damaged": True})
    damaged = EvaluationInputs(features=str(features), reward=inputs.reward, policy=inputs.policy)
    with pytest.raises(Refused, match="1 of 3 clips were rejected"):
        run(damaged, tmp_path / "out")
    dataset = Dataset.open(str(tmp_path / "out"), SCORES)
    assert dataset.num_rows() == 2
    assert dataset.read_rejects().to_pylist()[0]["reason"] == "not_media"


def test_a_reward_given_as_policy_is_refused_before_any_work(inputs: EvaluationInputs, tmp_path: Path) -> None:
    wrong = EvaluationInputs(features=inputs.features, reward=inputs.reward, policy=inputs.reward)
    with pytest.raises(InputError, match="is not a policy"):
        run(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_reward_and_a_missing_split_are_named(inputs: EvaluationInputs, tmp_path: Path) -> None:
    missing = EvaluationInputs(features=inputs.features, reward=str(tmp_path / "nothing"), policy=inputs.policy)
    with pytest.raises(InputError, match="nothing does not exist"):
        run(missing, tmp_path / "out")
    with pytest.raises(InputError, match="no clips of split 'val'"):
        evaluate(
            inputs,
            EvaluationSettings(
                subject="ground_truth",
                split="val",
                seed=0,
                num_candidates=1,
                sampling=Sampling(num_steps=1, guidance=1.0),
                max_clips=None,
            ),
            out=str(tmp_path / "out"),
            pool=HERE,
        )


class Seen(SilentTracker):
    """A tracker that keeps what it is shown."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.images: dict[str, bytes] = {}
        self.sounds: dict[str, bytes] = {}
        self.videos: dict[str, bytes] = {}

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.values |= values

    def image(self, name: str, image: bytes | Figure) -> None:
        if not isinstance(image, bytes):
            sink = io.BytesIO()
            image.savefig(sink, format="png")
            image = sink.getvalue()
        self.images[name] = image

    def audio(self, name: str, wav: bytes) -> None:
        self.sounds[name] = wav

    def video(self, name: str, mp4: bytes) -> None:
        self.videos[name] = mp4


def test_its_run_shows_numbers_pictures_sounds_and_videos_of_what_was_scored(
    inputs: EvaluationInputs, tmp_path: Path
) -> None:
    seen = Seen()
    settings = EvaluationSettings(
        subject="policy",
        split="test",
        seed=0,
        num_candidates=2,
        sampling=Sampling(num_steps=2, guidance=1.0),
        max_clips=4,
    )
    out = str(tmp_path / "scores")
    evaluate(inputs, settings, out=out, pool=HERE, track=lambda context: seen, say=lambda line: None)
    assert seen.values == measures(out)
    rows = {row["clip_id"]: row for row in Dataset.open(out, SCORES).read(["clip_id", "audio"]).to_pylist()}
    assert len(seen.sounds) == len(seen.videos) == SHOWN_CLIPS
    assert len(seen.images) == 2 * SHOWN_CLIPS + 1
    for picture in seen.images.values():
        assert np.asarray(Image.open(io.BytesIO(picture)).convert("L")).std() > 1, "the picture is blank"
    for name, wav in seen.sounds.items():
        stored = decode_flac(rows[name.removesuffix("_policy")]["audio"])
        with wave_file.open(io.BytesIO(wav)) as sound:
            samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16)
        np.testing.assert_array_equal(samples, np.rint(stored * 32768))
    for mp4 in seen.videos.values():
        with av.open(io.BytesIO(mp4)) as video:
            assert [stream.type for stream in video.streams] == ["video", "audio"]
