"""A video, of any length and with or without sound -> the same video with generated sound."""

import sys
from dataclasses import dataclass

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put generated sound under a video; its picture is copied packet by packet."""

    policy: cli.StoragePath
    """Checkpoint to sample from."""
    video: cli.StoragePath
    """The video; its own sound, if there is one, is not listened to."""
    out: cli.StoragePath
    """The mp4 to write."""
    prompt: str = ""
    """Words about the sound; may be empty."""
    reward: cli.StoragePath | None = None
    """SF-CAVP checkpoint that picks the best of --num-candidates."""
    num_candidates: int = 1
    """Sounds made for each window, the best of which is kept."""
    encoders: str = "grids"
    """Frozen encoders of the policy's conditions."""
    seed: int = 0
    """Seed of the noise; the same command gives the same sound."""
    num_steps: int = 25
    """Euler steps of the sampler."""
    guidance: float = 4.5
    """Classifier-free guidance; 1 is the conditional field alone."""

    def __post_init__(self) -> None:
        cli.require(
            self.num_candidates >= 1 and self.num_steps >= 1, "--num-candidates and --num-steps must be at least 1"
        )
        cli.require(
            self.num_candidates == 1 or self.reward is not None,
            "--num-candidates needs --reward: nothing else says which candidate is best",
        )


def main(options: Options) -> int:
    """Write the video and say what was made."""
    from pipelines.generation import GenerationSettings, generate, load_generator
    from pipelines.preferences.candidates import Sampling

    settings = GenerationSettings(
        prompt=options.prompt,
        encoders=options.encoders,
        seed=options.seed,
        sampling=Sampling(num_steps=options.num_steps, guidance=options.guidance),
        num_candidates=options.num_candidates,
    )
    made = generate(
        load_generator(options.policy, options.reward, settings),
        settings,
        video=options.video,
        out=options.out,
        progress=_show_progress,
    )
    rewards = ", ".join("refused" if r is None else f"{r:+.2f}" for r in made.rewards)
    judged = f"; R of each: {rewards}" if made.rewards else ""
    print(f"{options.out}: {made.duration_s:.3f} s of sound from {made.num_windows} windows{judged}")
    return 0


def _show_progress(done: int, total: int) -> None:
    if total > 1:
        sys.stderr.write(f"window {done} of {total}\n")


if __name__ == "__main__":
    cli.run("generate", Options, main)
