"""Samples a second of the training loop against a bare torch loop: python -m benchmarks.train_step.

Same model, same batch, same optimizer, one process; the loop adds DeepSpeed, reading, drawing and the journal.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.table import show
from models.flow_matching import flow_matching_loss, interpolate, sample_times
from models.policy import Policy
from pipelines.training.flow_matching_objective import FlowMatchingObjective, fit_starting_policy
from pipelines.training.launch import fit
from pipelines.training.loop import TrainingOrder
from pipelines.training.options import TrainingOptions

SIZE = "tiny"


def bare_samples_per_s(folder: Path, batch: int, steps: int) -> float:
    """A loop of forward, backward, clip and AdamW on made-up latents of the right shapes."""
    policy = Policy.load(folder)
    network = policy.network.train()
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    config = network.config
    conditions = [
        torch.randn(batch, length, width, generator=generator)
        for length, width in (
            (config.clip_len, config.clip_dim),
            (config.sync_len, config.sync_dim),
            (config.text_len, config.text_dim),
        )
    ]
    started = 0.0
    for step in range(steps + 2):
        if step == 2:
            started = time.perf_counter()
        x0, x1 = (torch.randn(policy.noise_shape(batch), generator=generator) for _ in range(2))
        t = sample_times(batch, generator)
        loss = flow_matching_loss(network(interpolate(x0, x1, t), *conditions, t), x0, x1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
    return batch * steps / (time.perf_counter() - started)


def main() -> None:
    """Measure both on a features dataset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", default="runs/demo/features", help="features of the tiny spec")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", help="write the table as JSON too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch) / "start"
        start.mkdir()
        fit_starting_policy(SIZE, 0, options.features, "train", start)
        bare = bare_samples_per_s(start, options.batch, options.steps)
        rates: list[float] = []
        objective = FlowMatchingObjective(
            start=str(start), features=options.features, size=SIZE, train_split="train", val_split=None
        )
        training = TrainingOptions(
            steps=options.steps, batch_size=options.batch, lr=1e-3, checkpoint_every=options.steps + 1
        )
        order = TrainingOrder(objective, training, scratch)
        fit(order, num_workers=0, report=lambda _, metrics: rates.append(metrics["samples_per_s"]))
    ours = sorted(rates[2:])[len(rates[2:]) // 2]
    row = {"loop samples/s (median step)": ours, "bare torch samples/s": bare, "ratio": ours / bare}
    show(f"training step, {SIZE}, batch {options.batch}, one process", [row], options.json)


if __name__ == "__main__":
    main()
