"""The generator on one CUDA device: training samples a second, memory, latency: python -m benchmarks.gpu_mmdit.

Baseline: the device's own bf16 matrix rate, measured in the same run. Training is what jobs do: float32 weights, bf16
autocast, AdamW; sampling is a bf16 network. Needs only torch and models/, and no weights: random ones take as long.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.flow_matching import flow_matching_loss, interpolate, sample_times
from models.latent_transform import ChannelTransform
from models.mmdit import SIZES, SPEC_OF_SIZE, MMDiT
from models.policy import Policy

RESULTS = Path(__file__).parent / "results"
MATRIX_SIZE = 8192
GUIDANCE = 4.5
NUM_STEPS = 25
WARM_UP = 3


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call after warming up (and compiling), the device's work included."""
    for _ in range(WARM_UP):
        run()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def matrix_flops_per_s(device: torch.device, size: int, repeats: int) -> float:
    """FLOP a second of a square bf16 matrix product."""
    left, right = (torch.ones(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, device, repeats)


def random_batch(network: MMDiT, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Clip, sync and text features and two sets of latents of `batch` clips, on the network's device."""
    config = network.config
    shapes = (
        (config.clip_len, config.clip_dim),
        (config.sync_len, config.sync_dim),
        (config.text_len, config.text_dim),
        (config.latent_len, config.latent_dim),
        (config.latent_len, config.latent_dim),
    )
    return tuple(torch.randn(batch, *shape, generator=generator).to(network.device) for shape in shapes)


def training_step(network: MMDiT, batch: int) -> Callable[[], Tensor]:
    """One step of flow matching, from drawn times to AdamW; a call returns the loss."""
    generator = torch.Generator().manual_seed(0)
    *features, x0, x1 = random_batch(network, batch, generator)
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step() -> Tensor:
        t = sample_times(batch, generator).to(network.device)
        with torch.autocast(network.device.type, torch.bfloat16):
            velocity = network(interpolate(x0, x1, t), *features, t)
        loss = flow_matching_loss(velocity, x0, x1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        return loss.detach()

    return step


@torch.no_grad()
def arithmetic(run: Callable[[], object]) -> int:
    """FLOP of one call without gradients, as counted for the products and convolutions in it."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def measured(
    run: Callable[[], object], flops: int, samples: int, device: torch.device, repeats: int, rate: float
) -> dict[str, object]:
    """Figures of one call that does `flops` for `samples` clips; `rate` is the matrix rate in FLOP a second."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(run, device, repeats)
    return {
        "seconds": seconds,
        "samples/s": samples / seconds,
        "TFLOP/s": flops / seconds / 1e12,
        "share of matrix rate": flops / seconds / rate,
        "peak memory GiB": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }


def training_rows(size: str, batch: int, device: torch.device, repeats: int, rate: float) -> list[dict[str, object]]:
    """A training step plainly, with activation checkpointing, compiled, and with both.

    Arithmetic is three times the forward's (every product has two in backward), also where blocks are computed twice:
    what counts is samples.
    """
    rows: list[dict[str, object]] = []
    for checkpointed, compiled in ((False, False), (True, False), (False, True), (True, True)):
        network = MMDiT(SIZES[size]).to(device).train()
        network.checkpoint_activations = checkpointed
        *features, x0, _ = random_batch(network, batch, torch.Generator().manual_seed(0))
        flops = 3 * arithmetic(partial(network, x0, *features, torch.full((batch,), 0.3, device=device)))
        step = training_step(network, batch)
        if compiled:
            network.compile_blocks()
        label: dict[str, object] = {
            "what": "training step",
            "batch": batch,
            "checkpoint": checkpointed,
            "compile": compiled,
        }
        try:
            rows.append(label | measured(step, flops, batch, device, repeats, rate))
        except torch.OutOfMemoryError:
            rows.append(label | {"failed": "out of memory; give a smaller --batch"})
    return rows


@torch.no_grad()
def sampling_rows(size: str, batch: int, device: torch.device, repeats: int, rate: float) -> list[dict[str, object]]:
    """A forward of `batch` clips and an 8 s clip from noise to latents (N = 1), plainly and compiled."""
    rows: list[dict[str, object]] = []
    for compiled in (False, True):
        network = MMDiT(SIZES[size]).to(device, torch.bfloat16).eval().requires_grad_(False)
        network.latent_mean.zero_()
        network.latent_std.fill_(1)
        generator = torch.Generator().manual_seed(0)
        *features, x0, _ = random_batch(network, batch, generator)
        t = torch.full((batch,), 0.3, device=device)
        policy = Policy(network, ChannelTransform(network), size)

        forward = partial(network, x0, *features, t)
        one = [tensor[:1] for tensor in (*features, x0)]
        sample = partial(policy.generate, *one, num_steps=NUM_STEPS, guidance=GUIDANCE)

        counted = [arithmetic(forward), arithmetic(sample)]
        if compiled:
            network.compile_blocks()
        for name, run, flops, samples in (
            ("forward", forward, counted[0], batch),
            (f"sampler, {NUM_STEPS} steps, guidance {GUIDANCE}", sample, counted[1], 1),
        ):
            label: dict[str, object] = {"what": name, "batch": samples, "checkpoint": False, "compile": compiled}
            rows.append(label | measured(run, flops, samples, device, repeats, rate))
    return rows


def report(size: str, batch: int, device: torch.device, repeats: int, matrix_size: int) -> dict[str, object]:
    """Everything this benchmark measures, ready for JSON."""
    rate = matrix_flops_per_s(device, matrix_size, repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rows = sampling_rows(size, batch, device, repeats, rate) + training_rows(size, batch, device, repeats, rate)
    return {
        "title": f"{size} on {name}",
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "device": name,
        "torch": torch.__version__,
        "size": size,
        "clip spec": SPEC_OF_SIZE[size],
        "bf16 matrix TFLOP/s": rate / 1e12,
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure on the first CUDA device and write the report; 2 where there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="medium_44k")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="where the report goes; by default benchmarks/results/")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("gpu_mmdit needs a CUDA device and there is none; benchmarks.networks measures the CPU\n")
        return 2
    # What training sets, see jobs/train_mmdit.py: the optimizer's float32 products may use TF32.
    torch.set_float32_matmul_precision("high")
    content = report(options.size, options.batch, torch.device("cuda"), options.repeats, MATRIX_SIZE)
    path = options.json or RESULTS / f"gpu_{options.size}_{content['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{text}written to {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
