"""The report: one file that needs nothing else, safe with any name in it, the same numbers in every form."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.data.store import open_files
from pipelines.data.units import HERE
from pipelines.errors import ContractError, InputError
from pipelines.evaluation.cards import enlarge
from pipelines.evaluation.evaluate import EvaluationInputs, evaluate, measures
from pipelines.evaluation.report import KIND, ReportSettings, write_report
from pipelines.evaluation.shown_clips import choose_clips
from pipelines.evaluation.spectrogram import BANDS, mel_decibels, spectrogram_png
from pipelines.evaluation.subjects import EvaluationSettings, Subject
from pipelines.preferences.candidates import Sampling
from tests.demo_factory import write_demo_features, write_untrained_policy, write_untrained_reward

HOSTILE = '<script>alert("M_0")</script>&'


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]


def settings(**changes: object) -> ReportSettings:
    values = {
        "labels": (HOSTILE, "shuffled", "truth"),
        "num_clips": 2,
        "clip_ids": (),
        "num_resamples": 50,
        "title": "Listening page",
        **changes,
    }
    return ReportSettings(**values)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Features, and the scores of three subjects on them."""
    root = tmp_path_factory.mktemp("report")
    inputs = EvaluationInputs(
        features=str(write_demo_features(root / "features", {"test": 5})),
        reward=str(write_untrained_reward(root / "reward")),
        policy=str(write_untrained_policy(root / "policy")),
    )
    subjects: tuple[Subject, ...] = ("policy", "shuffled", "ground_truth", "inverted")
    for subject in subjects:
        evaluate(
            inputs,
            EvaluationSettings(
                subject=subject,
                split="test",
                seed=0,
                num_candidates=2 if subject == "policy" else 1,
                sampling=Sampling(num_steps=2, guidance=1.0),
                max_clips=None,
            ),
            out=str(root / "scores" / subject),
            pool=HERE,
            say=lambda line: None,
        )
    return {"features": inputs.features, **{subject: str(root / "scores" / subject) for subject in subjects}}


@pytest.fixture(scope="module")
def report(scored: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "report"
    places = [scored["policy"], scored["shuffled"], scored["ground_truth"]]
    write_report(scored["features"], places, settings(), out=str(out), say=lambda line: None)
    return out


def test_the_report_is_an_artifact_whose_files_are_listed(report: Path) -> None:
    _, manifest = open_files(str(report), KIND)
    assert [entry["path"] for entry in manifest["files"]] == ["index.html", "summary.json", "table.txt"]


def test_the_page_asks_for_nothing_from_outside(report: Path) -> None:
    text = (report / "index.html").read_text()
    tags = Tags(text)
    policy = next(m["content"] for m in tags.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for tag, attributes in tags.found:
        for name in ("src", "href", "poster", "srcset", "data", "action", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), f"<{tag} {name}={value[:60]}>"
    assert not tags.all("link")
    assert not tags.all("iframe")


def test_a_hostile_label_is_shown_and_not_run(report: Path) -> None:
    text = (report / "index.html").read_text()
    assert HOSTILE not in text
    assert "&lt;script&gt;alert(&quot;M_0&quot;)&lt;/script&gt;&amp;" in text
    assert len(Tags(text).all("script")) == 1


def test_every_clip_has_the_real_sound_and_every_subject_once(report: Path) -> None:
    tags = Tags((report / "index.html").read_text())
    cards = [d for d in tags.all("div") if (d.get("class") or "").split()[:1] == ["card"]]
    # Two clips; the scores of the real sound go on its own card, so three sounds a clip.
    assert len(cards) == len(tags.all("video")) == 2 * 3
    assert sum("truth" in (card.get("class") or "") for card in cards) == 2


def test_each_video_is_a_playable_mp4_with_picture_and_sound_of_the_clips_length(report: Path) -> None:
    for video in Tags((report / "index.html").read_text()).all("video"):
        kind, _, content = (video["src"] or "").partition(";base64,")
        assert kind == "data:video/mp4"
        with av.open(io.BytesIO(base64.b64decode(content))) as container:
            picture = container.streams.video[0]
            assert (picture.codec_context.name, picture.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert picture.codec_context.width == 256
            assert float(picture.duration * picture.time_base) == pytest.approx(2.5)
            sound = container.streams.audio[0]
            assert float(sound.duration * sound.time_base) == pytest.approx(2.5, abs=0.07)


def test_the_first_video_sounds_like_the_truth_and_the_second_does_not(report: Path) -> None:
    videos = Tags((report / "index.html").read_text()).all("video")
    levels = []
    for video in videos[:2]:
        content = base64.b64decode((video["src"] or "").partition(";base64,")[2])
        with av.open(io.BytesIO(content)) as container:
            wave = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
        levels.append(np.abs(wave))
    assert levels[0].max() > 0.1
    assert not np.allclose(levels[0][:30_000], levels[1][:30_000], atol=0.02)


def test_json_text_and_page_hold_the_same_numbers(report: Path, scored: dict[str, str]) -> None:
    summary = json.loads((report / "summary.json").read_text())
    found = measures(scored["policy"])
    values = summary["subjects"][HOSTILE]["values"]
    assert {name: entry["value"] for name, entry in values.items()} == pytest.approx(found)
    text = (report / "table.txt").read_text()
    page = (report / "index.html").read_text()
    for name in ("reward", "f1", "log_mel_distance", "frechet"):
        assert f"{found[name]:.3f}" in text
        assert f"<b>{found[name]:.3f}</b>" in page
    assert summary["best_of_n"][HOSTILE]["bon_2"] <= summary["best_of_n"][HOSTILE]["oracle_2"]
    assert list(summary["best_of_n"]) == [HOSTILE]


def test_a_report_with_the_real_sounds_after_the_codec_measures_every_subject_from_them(
    scored: dict[str, str], tmp_path: Path
) -> None:
    names = ("policy", "inverted")
    write_report(
        scored["features"],
        [scored[name] for name in names],
        settings(labels=names),
        out=str(tmp_path / "report"),
        say=lambda line: None,
    )
    subjects = json.loads((tmp_path / "report/summary.json").read_text())["subjects"]
    found = {name: subjects[name]["values"]["frechet_codec"]["value"] for name in names}
    assert found["inverted"] == pytest.approx(0.0, abs=1e-6)
    assert found["policy"] == pytest.approx(measures(scored["policy"], scored["inverted"])["frechet_codec"])
    assert "Fréchet to codec v" in (tmp_path / "report/table.txt").read_text()


def test_the_same_report_again_is_skipped_and_a_fresh_one_has_the_same_bytes(
    report: Path, scored: dict[str, str], tmp_path: Path
) -> None:
    places = [scored["policy"], scored["shuffled"], scored["ground_truth"]]
    assert write_report(scored["features"], places, settings(), out=str(report), say=lambda line: None) == "skip"
    write_report(scored["features"], places, settings(), out=str(tmp_path / "again"), say=lambda line: None)
    for name in ("index.html", "summary.json", "table.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (report / name).read_bytes()


def test_clips_are_chosen_by_their_id_alone_and_those_asked_for_come_first() -> None:
    clip_ids = [f"clip_{i}" for i in range(50)]
    chosen = choose_clips(clip_ids, 10)
    assert chosen == choose_clips(clip_ids[::-1], 10)
    assert chosen != clip_ids[:10]
    asked = choose_clips(clip_ids, 3, ("clip_40", "clip_7"))
    assert asked[:2] == ["clip_40", "clip_7"]
    assert len(asked) == 3
    with pytest.raises(InputError, match="clip_99"):
        choose_clips(clip_ids, 2, ("clip_99",))


def test_scores_of_other_features_are_refused(scored: dict[str, str], tmp_path: Path) -> None:
    other = write_demo_features(tmp_path / "other", {"test": 2}, seed=1)
    with pytest.raises(InputError, match="other features"):
        write_report(str(other), [scored["policy"]], settings(labels=("M_0",)), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_labels_and_scores_must_come_in_pairs(scored: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 --scores and 3 --labels"):
        write_report(scored["features"], [scored["policy"]], settings(), out=str(tmp_path / "out"))
    with pytest.raises(InputError, match="name of its own"):
        settings(labels=("a", "a"))


def test_a_features_dataset_given_as_scores_is_named(scored: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="holds features/3"):
        write_report(scored["features"], [scored["features"]], settings(labels=("M_0",)), out=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((64, 64), (256, 256)), ((224, 224), (448, 448)), ((300, 400), (300, 400)), ((257, 300), (256, 300))],
)
def test_small_pictures_are_enlarged_by_a_whole_factor_to_even_sides(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert enlarge(np.zeros((2, *shape, 3), np.uint8)).shape == (2, *expected, 3)


def test_a_spectrogram_shows_a_tone_where_it_is_with_low_bands_at_the_bottom() -> None:
    time_s = np.arange(40_000) / 16_000
    wave = np.where(time_s < 1.25, np.sin(2 * np.pi * 300 * time_s), np.sin(2 * np.pi * 6000 * time_s))
    decibels = mel_decibels(wave.astype(np.float32), 16_000)
    assert decibels.shape[0] == BANDS
    pixels = np.asarray(Image.open(io.BytesIO(spectrogram_png(decibels, float(decibels.max())))).convert("L"), int)
    half = pixels.shape[1] // 2
    first, second = pixels[:, : half - 20].mean(axis=1), pixels[:, half + 20 :].mean(axis=1)
    assert first.argmax() > 0.7 * BANDS
    assert second.argmax() < 0.3 * BANDS
