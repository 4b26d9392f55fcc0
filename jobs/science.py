"""A controlled study of preference rounds on the synthetic world: python jobs/science.py --out runs/science.

Every cell (an M_0, a reward, an arm, its scores) is the job of that name as a stage, so a launch of hours that was
killed goes on where it was, and `--table-only` makes the results at any time from what is done.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import cli
from jobs.chain import Step, parse_all, run_all, seconds_of

if TYPE_CHECKING:
    from pipelines.evaluation.study import Arm, Study

STUDIES = Path(__file__).resolve().parent / "studies"
NUM_CANDIDATES = 5
"""Candidates of M_0 a clip: Best-of-5."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run a study's arms over its seeds, and write its tables and figures."""

    out: cli.StoragePath
    """Folder for everything the study makes."""
    study: str = "rpo_demo_world"
    """A name in jobs/studies, or the path of a YAML file."""
    num_workers: int = 2
    """Workers of every stage."""
    table_only: bool = False
    """Run nothing: make the results from the cells that are done."""
    results: cli.StoragePath | None = None
    """Folder for tables and figures; None: `results` in --out."""

    def __post_init__(self) -> None:
        cli.require(self.num_workers >= 1, f"--num-workers must be at least 1, got {self.num_workers}")


def main(options: Options) -> int:
    """Run what is not done yet, then write the results."""
    from pipelines.evaluation.study import read_study

    path = Path(options.study)
    study = read_study(path if path.suffix in (".yaml", ".yml") else STUDIES / f"{options.study}.yaml")
    todo = steps(study, options.out, options.num_workers)
    parse_all(todo, study.preset)
    if not options.table_only:
        from pipelines.tracking import open_launch

        with open_launch(options.out, "science", params=vars(options), tags={}):
            run_all(todo, out=options.out, preset=study.preset, num_workers=options.num_workers)
    print(_write_results(study, options, todo))
    return 0


def steps(study: "Study", out: str, num_workers: int) -> list[Step]:
    """The stages in order, so that a study that is cut short has whole replicates: one after the other, arms of only
    some replicates last."""
    workers = ("--num-workers", str(num_workers))
    found = []
    for world, features, flags in (("world", "features", study.world), ("m0_world", "m0_features", study.m0_world)):
        if flags:
            found.append(_step("make_demo_world", out, f"{out}/{world}", *cli.flatten(dict(flags)), *workers))
            manifest = ("--manifest", f"{out}/{world}/clips.csv")
            found.append(_step("preprocess", out, f"{out}/{features}", *manifest, *workers))
    for seed in study.seeds:
        found += _before_the_arms(study, out, seed, workers)
        for arm in (arm for arm in study.arms if arm.seeds == study.seeds):
            found += _arm(study, arm, out, seed, workers)
    for arm in (arm for arm in study.arms if arm.seeds != study.seeds):
        for seed in arm.seeds:
            found += _arm(study, arm, out, seed, workers)
    return found


def _before_the_arms(study: "Study", out: str, seed: int, workers: tuple[str, ...]) -> list[Step]:
    from pipelines.evaluation.study import BASELINE, CODEC, DEGRADED_FLAG
    from pipelines.evaluation.study_folders import Replicate

    folders = Replicate(out, seed)
    own, data = (f"--seed={seed}", *workers), _clips(out, "features")
    found = [_step("train_mmdit", out, folders.m0, *_m0_clips(study, out), *cli.flatten(dict(study.m0)), *own)]
    if study.degrades:
        flags = ("--policy", folders.m0, *data, *cli.flatten(dict(study.degrade)))
        found.append(_step("degrade", out, folders.degraded, *flags, *own))
    for name, options in study.rewards.items():
        more = ("--degraded", folders.degraded) if DEGRADED_FLAG in options else ()
        found.append(_step("train_sf_cavp", out, folders.reward(name), *data, *more, *cli.flatten(dict(options)), *own))
        judged = (folders.m0, folders.reward(name))
        found.append(_scores(out, folders.ranked(name), "val", *judged, NUM_CANDIDATES, workers))
    judge = folders.reward(study.reward)
    found.append(_scores(out, folders.tested(BASELINE), "test", folders.m0, judge, NUM_CANDIDATES, workers))
    for split, place in (("val", folders.codec_on_val), ("test", folders.tested(CODEC))):
        flags = (*data, "--reward", judge, "--subject=inverted", f"--split={split}", *workers)
        found.append(_step("evaluate", out, place, *flags))
    return found


def _arm(study: "Study", arm: "Arm", out: str, seed: int, workers: tuple[str, ...]) -> list[Step]:
    from pipelines.evaluation.study_folders import Replicate, policies

    folders = Replicate(out, seed)
    place, judge = folders.arm(arm.name), folders.reward(study.reward)
    flags = (*cli.flatten(dict(arm.flags)), f"--seed={seed}", *workers)
    clips = _clips(out, "features") if arm.clips == "world" else _m0_clips(study, out)
    if arm.job == "train_mmdit":
        found = [_step(arm.job, out, place, "--init", folders.m0, *clips, *flags)]
    else:
        inputs = ("--policy", folders.m0, "--reward", judge, *clips)
        rounds = (f"--rounds={study.num_rounds(arm)}", "--gate=report")
        found = [_step(arm.job, out, place, *inputs, *flags, *rounds)]
    for subject, policy in policies(study, arm, place).items():
        found.append(_scores(out, folders.tested(subject), "test", policy, judge, 2, workers))
    return found


def _scores(
    out: str, place: str, split: str, policy: str, reward: str, num_candidates: int, workers: tuple[str, ...]
) -> Step:
    judged = (*_clips(out, "features"), "--reward", reward, "--policy", policy)
    return _step("evaluate", out, place, *judged, f"--split={split}", f"--num-candidates={num_candidates}", *workers)


def _clips(out: str, name: str) -> tuple[str, str]:
    return "--features", f"{out}/{name}"


def _m0_clips(study: "Study", out: str) -> tuple[str, str]:
    return _clips(out, "m0_features" if study.m0_world else "features")


def _step(job: str, out: str, place: str, *flags: str) -> Step:
    return Step(place.removeprefix(f"{out}/"), job, (*flags, "--out", place), place)


def _write_results(study: "Study", options: Options, todo: list[Step]) -> str:
    """Tables and figures from the cells that are done; returns the tables as text."""
    from pipelines.evaluation.study_folders import read_cells, read_rankings, read_rounds, read_val_cells
    from pipelines.evaluation.study_page import write_results

    out = options.out
    done = f"{sum(step.is_done for step in todo)} of {len(todo)} stages are done."
    folder = options.results or f"{out}/results"
    text = write_results(
        folder,
        done=done,
        cells=read_cells(study, out),
        val_cells=read_val_cells(study, out),
        rankings=read_rankings(study, out),
        rounds=read_rounds(study, out),
        worker_seconds=_cost(out, options.num_workers),
        compared_with=study.compared_with,
        claims=study.claims,
    )
    return f"{text}\ntables and figures: {folder}"


def _cost(out: str, num_workers: int) -> dict[str, float]:
    """Worker seconds of each kind of step: the median over replicates of wall time x workers."""
    kinds: dict[str, list[float]] = {}
    for name, seconds in seconds_of(out).items():
        kind = name.partition("/")[2] if name.startswith("seed_") else name
        kinds.setdefault(kind, []).append(seconds * num_workers)
    return {kind: statistics.median(values) for kind, values in kinds.items()}


if __name__ == "__main__":
    cli.run("science", Options, main)
