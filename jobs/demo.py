"""The whole line on the synthetic world: python jobs/demo.py --out runs/demo.

Every stage is the job of that name with the tiny preset, and its command is printed, so that each can be given by hand.
Killed and started again it goes on where it was.
"""

import json
import time
from dataclasses import dataclass

from jobs import cli
from jobs.chain import Step, run_all, seconds_of

GATE_CLIPS = 64
"""Clips of val that a round is judged by; preset tiny only reports the verdict."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make the synthetic world, train M_0 and SF-CAVP on it, run preference rounds with their control, and report."""

    out: cli.StoragePath
    """Folder for everything the demo makes."""
    preset: str = "tiny"
    """Preset of every stage."""
    rounds: int = 2
    """Preference rounds."""
    num_train: int = 1536
    """Clips that SF-CAVP and M_0 are trained on."""
    num_rpo: int = 512
    """Clips of the preference rounds."""
    num_val: int = 256
    """Clips for calibration and gates."""
    num_test: int = 192
    """Clips of the reported table."""
    num_workers: int = 2
    """Workers of every stage."""
    seed: int = 0
    """Seed of the world."""

    def __post_init__(self) -> None:
        cli.require(self.rounds >= 1, f"--rounds must be at least 1, got {self.rounds}")
        cli.require(self.num_workers >= 1, f"--num-workers must be at least 1, got {self.num_workers}")


def steps(options: Options) -> list[Step]:
    """The stages in order, as the commands a person would give."""
    out, workers = options.out, ("--num-workers", str(options.num_workers))
    features, m0, degraded, reward = (f"{out}/{name}" for name in ("features", "m0", "degraded", "sf_cavp"))
    data = ("--features", features)
    counts = (
        f"--num-train={options.num_train}",
        f"--num-rpo={options.num_rpo}",
        f"--num-val={options.num_val}",
        f"--num-test={options.num_test}",
    )

    def step(name: str, job: str, place: str, *flags: str) -> Step:
        return Step(name, job, (*flags, "--out", place), place)

    def scores(name: str, *flags: str) -> Step:
        place = f"{out}/scores/{name}"
        return step(f"evaluate_{name}", "evaluate", place, *data, "--reward", reward, "--split=test", *workers, *flags)

    models = {"m0": m0}
    for k in range(options.rounds):
        models[f"m{k + 1}"] = f"{out}/rpo/round_{k}/policy"
    models[f"control{options.rounds}"] = f"{out}/rpo/round_{options.rounds - 1}/control"
    # M_0 first: it is what the others are compared with.
    shown = [*models, "ground_truth", "inverted"]
    labels = [*(_label(name) for name in models), "real", "real, inverted"]
    return [
        step("world", "make_demo_world", f"{out}/world", *counts, f"--seed={options.seed}", *workers),
        step("preprocess", "preprocess", features, "--manifest", f"{out}/world/clips.csv", *workers),
        step("m0", "train_mmdit", m0, *data, *workers),
        step("degraded", "degrade", degraded, "--policy", m0, *data, *workers),
        step("sf_cavp", "train_sf_cavp", reward, *data, "--degraded", degraded, *workers),
        step(
            "rpo",
            "rpo_rounds",
            f"{out}/rpo",
            *("--policy", m0, "--reward", reward, *data, f"--rounds={options.rounds}", "--with-control", *workers),
            f"--eval-clips={GATE_CLIPS}",
        ),
        scores("ground_truth", "--subject=ground_truth"),
        scores("inverted", "--subject=inverted"),
        # Five candidates for the Best-of-N curve of M_0; two are enough for the diversity of the others.
        *(
            scores(name, "--policy", place, f"--num-candidates={5 if name == 'm0' else 2}")
            for name, place in models.items()
        ),
        scores("shuffled", "--policy", m0, "--subject=shuffled"),
        step(
            "check_reward",
            "check_reward",
            f"{out}/gates",
            *("--reward", reward, *data, "--split=test"),
            *("--scores", f"{out}/scores/m0", "--truth-scores", f"{out}/scores/inverted"),
        ),
        step(
            "report",
            "report",
            f"{out}/report",
            *("--scores", *(f"{out}/scores/{name}" for name in shown), "--labels", *labels),
            *data,
        ),
    ]


def _label(name: str) -> str:
    return f"M_{name[1:]}" if name.startswith("m") else f"control {name.removeprefix('control')}"


def main(options: Options) -> int:
    """Run what is not done yet, print the table, write summary.json."""
    from pipelines.data.storage import open_folder
    from pipelines.evaluation.demo_summary import demo_summary, demo_table
    from pipelines.tracking import open_launch

    todo = steps(options)
    started = time.monotonic()
    with open_launch(options.out, "demo", params=vars(options), tags={}) as launch:
        run_all(todo, out=options.out, preset=options.preset, num_workers=options.num_workers)
        summary = demo_summary(options.out, rounds=options.rounds, seconds=seconds_of(options.out))
        text = (json.dumps(summary, indent=1) + "\n").encode()
        open_folder(options.out).write_bytes("summary.json", text)
        launch.document("summary.json", text)
    print(demo_table(summary))
    print(f"{time.monotonic() - started:.0f} s this time; all numbers: {options.out}/summary.json")
    print(f"listen: {options.out}/report/index.html")
    return 0 if summary["gate_passed"] else 4


if __name__ == "__main__":
    cli.run("demo", Options, main)
