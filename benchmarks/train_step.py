"""Samples a second of the training loop against a bare torch DDP loop: python -m benchmarks.train_step.

Same model, shapes, batch, optimizer, clipping and number of processes, in turns; the bare loop has its batch in memory
and neither reads, draws conditions, logs nor averages. Both time whole steps after the first `WARMUP`, and the ratio is
of the median steps of a turn. Ours starts workers by Ray Train, or runs in process with one rank where --in-process is
given. Also said: what a step waits for data, and what the start is spent on.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.nn.parallel import DistributedDataParallel

from benchmarks.table import show
from models.flow_matching import flow_matching_loss, interpolate
from models.mmdit import SIZES, SPEC_OF_SIZE
from models.policy import Policy
from models.spec import SPECS
from pipelines.cluster import connect
from pipelines.data.contracts import FEATURES
from pipelines.data.tables import table_from_rows
from pipelines.training.activations import fake_batch
from pipelines.training.flow_matching_objective import FlowMatchingObjective, fit_starting_policy
from pipelines.training.launch import fit
from pipelines.training.loop import TrainingOrder
from pipelines.training.options import TrainingOptions
from pipelines.training.workers import warm_workers
from tests.feature_factory import feature_row, write_dataset

WARMUP = 2
Record = dict[str, float]


def write_made_up_features(out: Path, size: str, rows: int) -> str:
    """Write random features of a size's shapes; returns the folder."""
    spec, rng = SPECS[SPEC_OF_SIZE[size]], np.random.default_rng(0)
    made = []
    for index in range(rows):
        row = feature_row(rng, f"clip_{index:05d}", "train", SPECS["tiny"])
        row |= {"duration_s": spec.duration_s, "valid_s": spec.duration_s, "frames": [b"\xff\xd8"] * spec.frames_len}
        for name, shape in (("clip", (spec.clip_len, spec.clip_dim)), ("sync", (spec.sync_len, spec.sync_dim))):
            row[f"{name}_features"] = rng.standard_normal(shape).astype(np.float16)
        row["text_features"] = rng.standard_normal((spec.text_len, spec.text_dim)).astype(np.float16)
        row["latent_mean"] = rng.standard_normal((spec.latent_len, spec.latent_dim)).astype(np.float32)
        row["latent_std"] = np.full_like(row["latent_mean"], 0.1)
        made.append(row)
    table = table_from_rows(made, FEATURES, spec)
    return str(write_dataset(out, FEATURES, {"train": table}, {"rows": rows}, spec))


def bare_steps(rank: int, world: int, start: str, size: str, batch: int, steps: int, bf16: bool, scratch: str) -> None:
    """One rank of the bare loop: forward, backward, clip, AdamW, the loss read; rank 0 leaves its step times."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{scratch}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    policy = Policy.load(Path(start))
    model = DistributedDataParallel(policy.network.train())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(rank)
    inputs = {name: torch.zeros_like(tensor) for name, tensor in fake_batch(size, batch).items()}
    for name in ("clip_features", "sync_features", "text_features", "latent", "noise"):
        inputs[name].normal_(generator=generator)
    inputs["time"].uniform_(generator=generator)
    conditions = [inputs[name] for name in ("clip_features", "sync_features", "text_features")]
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        x0, t = inputs["noise"], inputs["time"]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            x1 = policy.transform.normalize(inputs["latent"])
            nulled = policy.network.replace_with_empty(
                (conditions[0], conditions[1], conditions[2]), inputs["drop_video"], inputs["drop_text"]
            )
            loss = flow_matching_loss(model(interpolate(x0, x1, t), *nulled, t), x0, x1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())
        times.append(time.perf_counter() - began)
    if rank == 0:
        Path(scratch, "times.json").write_text(json.dumps(times), encoding="utf-8")
    dist.destroy_process_group()


def bare_turn(start: str, options: argparse.Namespace) -> list[float]:
    """Run the bare loop once; seconds of every step after the warm-up."""
    world = 1 if options.in_process else options.workers
    with tempfile.TemporaryDirectory() as scratch:
        args = (world, start, options.size, options.batch, options.steps, options.precision == "bf16", scratch)
        processes.spawn(bare_steps, args=args, nprocs=world)
        return json.loads(Path(scratch, "times.json").read_text(encoding="utf-8"))[WARMUP:]


def our_turn(start: str, features: str, options: argparse.Namespace, scratch: str) -> tuple[list[Record], Record]:
    """Run our loop once: the records of every step after the warm-up, and what its start was spent on."""
    world = 1 if options.in_process else options.workers
    objective = FlowMatchingObjective(start=start, features=features, size=options.size, val_split=None)
    training = TrainingOptions(
        steps=options.steps,
        batch_size=options.batch * world,
        lr=1e-4,
        bf16=options.precision == "bf16",
        checkpoint_every=options.steps + 1,
    )
    records: list[Record] = []
    arrivals: list[float] = []

    def report(step: int, metrics: Record) -> None:
        arrivals.append(time.perf_counter())
        records.append(metrics)

    order = TrainingOrder(objective, training, scratch)
    began = time.perf_counter()
    if options.in_process:
        fit(order, num_workers=0, report=report)
        return records[WARMUP:], {"model, DeepSpeed, first step": arrivals[0] - began}
    with warm_workers(world) as group:
        while len(group.nodes()) < world:
            time.sleep(0.05)
        enrolled = time.perf_counter()
        group.run(order, report)
    spent = {"worker group": enrolled - began, "model, DeepSpeed, first step": arrivals[0] - enrolled}
    return records[WARMUP:], spent


def in_own_process(start: str, features: str, options: argparse.Namespace, result: str) -> None:
    """Run `our_turn` in a process that leaves with its memory; writes to the file `result`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        if options.in_process:
            records, spent = our_turn(start, features, options, scratch)
        else:
            with connect():
                connected = time.perf_counter() - began
                records, spent = our_turn(start, features, options, scratch)
            spent = {"Ray": connected, **spent}
    Path(result).write_text(json.dumps({"records": records, "spent": spent}), encoding="utf-8")


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Take turns; one row of the table."""
    ratios, shares, rates, starts = [], [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        features = write_made_up_features(Path(scratch, "features"), options.size, options.rows)
        start, result = str(Path(scratch, "start")), str(Path(scratch, "result.json"))
        fit_starting_policy(options.size, 0, features, "train", Path(start))
        for _ in range(options.turns):
            bare_s = statistics.median(bare_turn(start, options))
            process = multiprocessing.get_context("spawn").Process(
                target=in_own_process, args=(start, features, options, result)
            )
            began = time.time()
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"our loop ended with {process.exitcode}")
            found = json.loads(Path(result).read_text(encoding="utf-8"))
            ours_s = statistics.median(record["step_s"] for record in found["records"])
            ratios.append(bare_s / ours_s)
            shares.append(sum(r["data_s"] for r in found["records"]) / sum(r["step_s"] for r in found["records"]))
            rates.append((found["records"][0]["samples_per_s"] * found["records"][0]["step_s"] / ours_s, bare_s))
            starts.append({**found["spent"], "whole turn": time.time() - began})
    world = 1 if options.in_process else options.workers
    parts = {name: statistics.median(row[name] for row in starts) for name in starts[0]}
    return {
        "ours, samples/s": statistics.median(rate for rate, _ in rates),
        "bare, samples/s": statistics.median(options.batch * world / seconds for _, seconds in rates),
        "ratio (median)": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "data wait, % of step": 100 * statistics.median(shares),
        **{f"{name}, s": value for name, value in parts.items()},
    }


def main() -> None:
    """Measure one size and precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--batch", type=int, default=2, help="samples of a rank")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64, help="of the made-up dataset")
    parser.add_argument("--in-process", action="store_true", help="one rank, without Ray")
    parser.add_argument("--json", help="write the table as JSON too")
    options = parser.parse_args()
    if options.steps <= WARMUP:
        parser.error(f"--steps must be above {WARMUP}")
    where = "one process" if options.in_process else f"{options.workers} workers"
    title = f"training step, {options.size}, {options.precision}, batch {options.batch} a rank, {where}"
    show(title, [measure(options)], options.json)


if __name__ == "__main__":
    main()
