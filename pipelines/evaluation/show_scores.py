"""What an evaluation shows in MLflow: its numbers, how its rewards are spread, and some clips to see and to hear."""

from pipelines.data.media_write import decode_flac, wav_bytes
from pipelines.data.store import Dataset
from pipelines.evaluation.cards import ClipMedia, Sound, page_clip
from pipelines.evaluation.plots import histogram_of
from pipelines.evaluation.scores import ClipScores
from pipelines.evaluation.shown_clips import SOUND_COLUMNS, TRUTH_COLUMNS, choose_clips, read_clips
from pipelines.evaluation.summary import point_values
from pipelines.tracking import Tracker

SHOWN_CLIPS = 3


def show_scores(tracker: Tracker, features: Dataset, scores: Dataset, values: ClipScores, subject: str) -> None:
    """Log metrics, a reward histogram, and of some clips the spectrogram, the sound and the video with that sound.

    The clips are those of the listening page, so that runs can be compared side by side.
    """
    tracker.metrics(0, point_values(values))
    tracker.image("reward_histogram", histogram_of({subject: values.values["reward"]}))
    clip_ids = choose_clips(values.clip_ids, SHOWN_CLIPS)
    truths = read_clips(features, clip_ids, TRUTH_COLUMNS)
    rows = read_clips(scores, clip_ids, SOUND_COLUMNS)
    rate_hz = features.spec.sample_rate_hz
    for clip_id in clip_ids:
        media = ClipMedia(row=truths[clip_id], sample_rate_hz=rate_hz, frame_rate_hz=features.spec.frames_rate_hz)
        shown = page_clip(media, [Sound(label=subject, row=rows[clip_id], is_truth=False)])
        real, made = shown.sounds
        tracker.image(f"{clip_id}_real", real.spectrogram_png)
        tracker.image(f"{clip_id}_{subject}", made.spectrogram_png)
        tracker.audio(f"{clip_id}_{subject}", wav_bytes(decode_flac(rows[clip_id]["audio"]), rate_hz))
        tracker.video(f"{clip_id}_{subject}", made.video_mp4)
