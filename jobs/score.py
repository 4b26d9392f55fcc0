"""A video and a sound -> the reward R, its two parts, and the offset at which they fit best."""

import json
from dataclasses import dataclass
from typing import Literal

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Does this sound belong to this picture, and at this moment?"""

    reward: cli.StoragePath
    """SF-CAVP checkpoint."""
    video: cli.StoragePath
    """File with the picture."""
    audio: cli.StoragePath | None = None
    """File with the sound: any audio or video file; by default the video's own."""
    spec: Literal["tiny", "16k", "44k"] = "tiny"
    """Clip spec whose window length and frames are used: those the reward was trained on."""
    json: bool = False
    """Print JSON, window by window, instead of text."""


def main(options: Options) -> int:
    """Print the score."""
    from models.spec import SPECS
    from pipelines.scoring import load_reward, score_file

    score = score_file(
        load_reward(options.reward),
        SPECS[options.spec],
        video=options.video,
        audio=options.audio,
    )
    if options.json:
        print(json.dumps(score.to_json(), indent=1, allow_nan=False))
        return 0
    for window in score.windows:
        at = f"from {window.start_s:.2f} s: " if len(score.windows) > 1 else ""
        if window.invalid_reason is not None:
            print(f"{at}refused, the sound is {window.invalid_reason}")
            continue
        print(
            f"{at}R {window.total:+.3f}  S_sem {window.semantic:+.3f}  S_tmp {window.temporal:+.3f}  "
            f"best offset {window.offset_s:+.3f} s"
        )
    if len(score.windows) > 1 and score.worst is not None:
        print(f"mean R {score.mean('total'):+.3f}, worst window {score.worst:+.3f}")
    return 0


if __name__ == "__main__":
    cli.run("score", Options, main)
