"""Makes the demo world on disk: mp4 files, then the manifest that names them, as one stage that can be killed.

Clips are made by Ray Data tasks; a file appears under its name only when complete, so the same command goes on with
the files that are missing. Pictures and sounds depend on seed and index alone, never on who made them.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

from pipelines.cluster import cluster_cpus, connect
from pipelines.data.demo_world import (
    CAPTION,
    DURATION_S,
    FRAME_RATE_HZ,
    SAMPLE_RATE_HZ,
    ClipPlan,
    plan_clips,
    render_clip,
)
from pipelines.data.manifest import COLUMNS
from pipelines.data.media import probe
from pipelines.data.media_write import write_mp4
from pipelines.data.storage import Folder, open_folder
from pipelines.data.store import files_manifest
from pipelines.data.unit_pool import actor_cpus
from pipelines.errors import EnvironmentFailed, InputError, MediaError
from pipelines.progress import Progress
from pipelines.stage import Outcome, StageContext, run_stage

KIND = "demo_world"
CLIPS_CSV = "clips.csv"
WORLD_VERSION = 2
"""Part of the fingerprint; raised when the same seed and index would give another clip."""
CLIPS_A_TASK = 32


def make_demo_world(
    *, seed: int, counts: Mapping[str, int], out: str, num_workers: int, options_yaml: str | None = None
) -> Outcome:
    """Write `clips/<clip id>.mp4` for every clip and `clips.csv`, the manifest that `preprocess` takes.

    Args:
        seed: the world's seed, >= 0.
        counts: clips a split.
        out: path or URI of the artifact.
        num_workers: Ray Data tasks at a time; 0 works in this process without Ray.
        options_yaml: the resolved options, kept beside the artifact.

    Raises:
        InputError: no clips, or a count or a split that the world does not have.
        StageConflict: `out` holds another world.
        EnvironmentFailed: the storage refuses.
    """
    try:
        plans = plan_clips(counts)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not plans:
        raise InputError("the demo world would have no clips; ask for at least one")

    def body(context: StageContext) -> None:
        with connect() if num_workers else nullcontext():
            events = _make_all(plans, seed, context.folder, num_workers)
        context.folder.write_bytes(CLIPS_CSV, _manifest_csv(plans, events).encode())
        names = [CLIPS_CSV, *(_name(plan.clip_id) for plan in plans)]
        content = {"kind": KIND, "files": files_manifest(context.folder, names), "counts": dict(counts)}
        context.tracker.metrics(0, {f"clips/{split}": count for split, count in counts.items()})
        context.finish(content)

    return run_stage(
        name="make_demo_world",
        config={"seed": seed, "counts": dict(counts)},
        inputs={},
        out=out,
        body=body,
        version=WORLD_VERSION,
        options_yaml=options_yaml,
    )


def _name(clip_id: str) -> str:
    return f"clips/{clip_id}.mp4"


def _make_all(plans: Sequence[ClipPlan], seed: int, folder: Folder, num_workers: int) -> dict[str, str]:
    """Make every clip that is not there; the events of every clip id as JSON."""
    groups = [plans[i : i + CLIPS_A_TASK] for i in range(0, len(plans), CLIPS_A_TASK)]
    events: dict[str, str] = {}
    with Progress(label="demo world", total=len(plans)) as progress:
        made = _make_here(groups, seed, folder) if num_workers == 0 else _make_on_ray(groups, seed, folder, num_workers)
        for receipt in made:
            events[receipt["clip_id"]] = receipt["events"]
            progress.advance(1)
    lost = [plan.clip_id for plan in plans if plan.clip_id not in events]
    if lost:
        raise RuntimeError(f"{len(lost)} clips gave no receipt, {lost[0]} among them")
    return events


def _make_here(groups: Sequence[Sequence[ClipPlan]], seed: int, folder: Folder) -> Iterator[dict[str, str]]:
    for group in groups:
        for plan in group:
            yield _make_clip(plan, seed, folder)


def _make_on_ray(
    groups: Sequence[Sequence[ClipPlan]], seed: int, folder: Folder, num_workers: int
) -> Iterator[dict[str, Any]]:
    import ray
    from ray.data import TaskPoolStrategy

    from pipelines.data.ray_data import quiet_ray_data

    quiet_ray_data()
    items = [{"group": json.dumps([asdict(plan) for plan in group])} for group in groups]
    source = ray.data.from_items(items, override_num_blocks=len(items))
    receipts = source.flat_map(
        partial(_make_group, seed=seed, out=folder.uri),
        compute=TaskPoolStrategy(min(num_workers, len(items))),
        num_cpus=actor_cpus(cluster_cpus(), num_workers),
    )
    for receipt in receipts.iter_rows():
        if receipt["failed"]:
            raise EnvironmentFailed(receipt["failed"])
        yield receipt


def _make_group(row: Mapping[str, str], *, seed: int, out: str) -> list[dict[str, str]]:
    folder = open_folder(out)
    try:
        made = [_make_clip(ClipPlan(**plan), seed, folder) for plan in json.loads(row["group"])]
    except EnvironmentFailed as error:
        # Travels as data: Ray's wrapping of exceptions would lose the type, and with it the exit code.
        return [{"clip_id": "", "events": "", "failed": str(error)}]
    return [{**receipt, "failed": ""} for receipt in made]


def _make_clip(plan: ClipPlan, seed: int, folder: Folder) -> dict[str, str]:
    """Render the clip, write its file unless it is there whole, and tell its events."""
    clip = render_clip(seed, plan.index)
    if not _is_whole(folder, _name(plan.clip_id)):
        content = io.BytesIO()
        write_mp4(content, clip.frames, FRAME_RATE_HZ, clip.wave, SAMPLE_RATE_HZ)
        folder.write_bytes(_name(plan.clip_id), content.getvalue())
    return {"clip_id": plan.clip_id, "events": json.dumps([asdict(event) for event in clip.events])}


def _is_whole(folder: Folder, name: str) -> bool:
    if not folder.size_bytes(name):
        return False
    try:
        info = probe(io.BytesIO(folder.read_bytes(name)), max_pixels=2**20)
    except MediaError:
        return False
    return info.has_video and info.has_audio and info.duration_s == DURATION_S


def _manifest_csv(plans: Sequence[ClipPlan], events: Mapping[str, str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for plan in plans:
        writer.writerow(
            {
                "video": _name(plan.clip_id),
                "start_s": 0.0,
                "duration_s": DURATION_S,
                "caption": CAPTION,
                "split": plan.split,
                "events": events[plan.clip_id],
            }
        )
    return text.getvalue()
