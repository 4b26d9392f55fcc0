"""A video, of any length and with or without sound -> the same video with generated sound; or words -> a sound."""

import sys
from dataclasses import dataclass

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put generated sound under a video, whose picture is copied packet by packet; or make a sound alone.

    Give --video, or --duration-s for sound from words alone.
    """

    policy: cli.StoragePath
    """Checkpoint to sample from."""
    out: cli.StoragePath
    """The file to write: .mp4 is the video with the sound, .wav or .flac the sound alone."""
    video: cli.StoragePath | None = None
    """The video; its own sound, if there is one, is not listened to."""
    duration_s: float | None = None
    """Seconds of sound, where there is no video."""
    prompt: str = ""
    """Words about the sound; may be empty."""
    negative_prompt: str = ""
    """Words about what is not wanted; needs a --guidance above 1."""
    reward: cli.StoragePath | None = None
    """SF-CAVP checkpoint that picks the best of --num-candidates."""
    num_candidates: int = 1
    """Sounds made for each window, the best of which is kept."""
    weights: cli.StoragePath | None = None
    """Folder that import_mmaudio made, with VAE, vocoder, Synchformer and CLIP; by default the policy's own."""
    encoders: str | None = None
    """Frozen encoders of the policy's conditions; by default those of its size."""
    seed: int = 0
    """Seed of the noise; the same command gives the same sound."""
    num_steps: int = 25
    """Euler steps of the sampler."""
    guidance: float = 4.5
    """Classifier-free guidance; 1 is the conditional field alone."""
    bf16: bool = False
    """Sample with the network in bfloat16: half its memory."""
    offload: bool = False
    """Have only one step's networks in memory: encoders, generator, then codec and reward. The sound is the same."""

    def __post_init__(self) -> None:
        cli.require(
            self.num_candidates >= 1 and self.num_steps >= 1, "--num-candidates and --num-steps must be at least 1"
        )
        cli.require(
            self.num_candidates == 1 or self.reward is not None,
            "--num-candidates needs --reward: nothing else says which candidate is best",
        )


def main(options: Options) -> int:
    """Write the file and say what was made."""
    from pipelines.generation import GenerationInputs, GenerationSettings, generate
    from pipelines.preferences.candidates import Sampling

    inputs = GenerationInputs(
        policy=options.policy,
        reward=options.reward,
        weights=options.weights,
        video=options.video,
        duration_s=options.duration_s,
    )
    settings = GenerationSettings(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        encoders=options.encoders,
        seed=options.seed,
        sampling=Sampling(num_steps=options.num_steps, guidance=options.guidance),
        num_candidates=options.num_candidates,
        bf16=options.bf16,
    )
    made = generate(inputs, settings, out=options.out, offload=options.offload, progress=_show_progress)
    rewards = ", ".join("refused" if r is None else f"{r:+.2f}" for r in made.rewards)
    judged = f"; R of each: {rewards}" if made.rewards else ""
    windows = f"{made.num_windows} window{'s' if made.num_windows > 1 else ''}"
    print(f"{options.out}: {made.duration_s:.3f} s of sound from {windows}{judged}")
    print(f"peak memory: {'; '.join(f'{name} {peak}' for name, peak in made.peaks)}")
    return 0


def _show_progress(step: str, done: int, total: int) -> None:
    if total > 1:
        sys.stderr.write(f"{step}: window {done} of {total}\n")


if __name__ == "__main__":
    cli.run("generate", Options, main)
