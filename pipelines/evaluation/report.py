"""The report: score tables as text and JSON, and one self-contained page to hear every subject on the same clips."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.data.contracts import FEATURES, SCORES
from pipelines.data.store import Dataset, files_manifest
from pipelines.errors import InputError
from pipelines.evaluation.cards import ClipMedia, Sound, page_clip
from pipelines.evaluation.evaluate import read_scores
from pipelines.evaluation.listening_page import Page
from pipelines.evaluation.plots import reward_against_score, reward_histogram
from pipelines.evaluation.ranking_quality import BestOfN, best_of_n
from pipelines.evaluation.scores import ClipScores
from pipelines.evaluation.shown_clips import SOUND_COLUMNS, TRUTH_COLUMNS, choose_clips, read_clips
from pipelines.evaluation.summary import Summary, summarise
from pipelines.evaluation.tables import best_of_n_text, plain_text
from pipelines.stage import Outcome, StageContext, run_stage

STAGE = "report"
KIND = "report"
PAGE, TABLE, SUMMARY = "index.html", "table.txt", "summary.json"


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What the report shows; every field affects its bytes."""

    labels: tuple[str, ...]
    """A name for each scores dataset; the first is what the others are compared with."""
    num_clips: int
    """Clips on the listening page."""
    clip_ids: tuple[str, ...]
    """These clips first, whatever their lot."""
    num_resamples: int
    title: str

    def __post_init__(self) -> None:
        if len(set(self.labels)) != len(self.labels) or not all(self.labels):
            raise InputError(f"--labels {' '.join(self.labels)}: give each scores dataset a name of its own")
        if self.num_clips < 0 or self.num_resamples < 1:
            raise InputError("--num-clips must not be negative and --num-resamples must be at least 1")


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """One scores dataset, opened."""

    label: str
    dataset: Dataset
    scores: ClipScores

    @property
    def is_truth(self) -> bool:
        """Whether these are the scores of the real sounds."""
        return self.dataset.manifest["config"]["subject"] == "ground_truth"

    @property
    def is_codec(self) -> bool:
        """Whether these are the scores of the real sounds after the codec."""
        return self.dataset.manifest["config"]["subject"] == "inverted"


def write_report(
    features: str,
    scores: Sequence[str],
    settings: ReportSettings,
    *,
    out: str,
    options_yaml: str | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Write `index.html`, `table.txt` and `summary.json` at `out`.

    Raises:
        InputError: scores of other features or of other clips, a label too many or too few, an unknown clip id.
    """
    if len(scores) != len(settings.labels) or not scores:
        raise InputError(f"{len(scores)} --scores and {len(settings.labels)} --labels; give one label for each")
    dataset = Dataset.open(features, FEATURES)
    subjects = [_open(label, place, dataset) for label, place in zip(settings.labels, scores, strict=True)]
    by_label = {subject.label: subject.scores for subject in subjects}
    codec = next((subject.scores for subject in subjects if subject.is_codec), None)
    if codec is not None:
        by_label = {label: one.beside_codec(codec) for label, one in by_label.items()}
    summary = summarise(by_label, num_resamples=settings.num_resamples)
    clip_ids = choose_clips(subjects[0].scores.clip_ids, settings.num_clips, settings.clip_ids)

    def body(context: StageContext) -> None:
        curves = {
            label: best_of_n(s, num_resamples=settings.num_resamples)
            for label, s in by_label.items()
            if s.num_candidates > 1
        }
        page = _page(dataset, subjects, settings, summary, curves, clip_ids)
        contents = {
            PAGE: page.to_html().encode(),
            TABLE: table_text(summary, curves).encode(),
            SUMMARY: _summary_json(summary, curves),
        }
        for name, content in contents.items():
            context.folder.write_bytes(name, content)
            context.tracker.document(f"report/{name}", content)
        context.finish({"kind": KIND, "files": files_manifest(context.folder, list(contents))})

    return run_stage(
        name=STAGE,
        config=vars(settings),
        inputs={
            "features": dataset.fingerprint,
            **{f"scores {subject.label}": subject.dataset.fingerprint for subject in subjects},
        },
        out=out,
        body=body,
        options_yaml=options_yaml,
        say=say,
    )


def _open(label: str, location: str, features: Dataset) -> _Subject:
    dataset = Dataset.open(location, SCORES)
    made_from = dataset.manifest["inputs"].get("features")
    if made_from != features.fingerprint:
        raise InputError(
            f"{location} was made from other features (fingerprint {str(made_from)[:12]}) than "
            f"{features.folder.uri} ({features.fingerprint[:12]}); give those of the evaluation"
        )
    return _Subject(label=label, dataset=dataset, scores=read_scores(location)[0])


def table_text(summary: Summary, curves: Mapping[str, BestOfN]) -> str:
    """The tables as plain text."""
    return "\n".join([plain_text(summary), *(best_of_n_text(label, curve) for label, curve in curves.items())])


def _summary_json(summary: Summary, curves: Mapping[str, BestOfN]) -> bytes:
    content = {**summary.to_json(), "best_of_n": {label: curve.to_json() for label, curve in curves.items()}}
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _page(
    features: Dataset,
    subjects: Sequence[_Subject],
    settings: ReportSettings,
    summary: Summary,
    curves: Mapping[str, BestOfN],
    clip_ids: Sequence[str],
) -> Page:
    truths = read_clips(features, clip_ids, TRUTH_COLUMNS)
    rows = {subject.label: read_clips(subject.dataset, clip_ids, SOUND_COLUMNS) for subject in subjects}
    clips = [
        page_clip(
            ClipMedia(row=truths[clip_id], sample_rate_hz=features.spec.sample_rate_hz, frame_rate_hz=16),
            [Sound(label=s.label, row=rows[s.label][clip_id], is_truth=s.is_truth) for s in subjects],
        )
        for clip_id in clip_ids
    ]
    by_label = {subject.label: subject.scores for subject in subjects}
    splits = sorted({str(subject.dataset.manifest["config"]["split"]) for subject in subjects})
    chosen = "those asked for, then by a hash of their id" if settings.clip_ids else "by a hash of their id"
    return Page(
        title=settings.title,
        about=f"{summary.num_clips} clips of split {', '.join(splits)}, spec {features.spec.name}",
        choice=f"{len(clips)} of {summary.num_clips} clips, chosen {chosen}, not by any score.",
        summary=summary,
        best_of_n=curves,
        plots_svg=[reward_histogram(by_label), reward_against_score(by_label)],
        clips=clips,
        lineage={
            "features": features.fingerprint[:12],
            **{f"scores of {s.label}": _lineage(s.dataset.manifest) for s in subjects},
        },
    )


def _lineage(manifest: Mapping[str, Any]) -> str:
    config = ", ".join(f"{name} {value}" for name, value in manifest["config"].items())
    inputs = ", ".join(f"{role} {fingerprint[:12]}" for role, fingerprint in manifest["inputs"].items())
    return f"{manifest['fingerprint'][:12]}: {config}; from {inputs}"
