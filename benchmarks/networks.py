"""CPU seconds of every network on one thread, beside the original's: python -m benchmarks.networks.

Baseline: this machine's own matrix rate, measured around every figure in the same run; the share says how much of the
time is arithmetic that nothing but a smaller algorithm can save. Weights are random: they do not change the time.
CPU seconds and not the clock's, so that neighbours on the machine matter less; medians, with the spread.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.table import show
from models.mmdit import SIZES, MMDiT
from models.synchformer import SYNCHFORMER, Synchformer
from models.vae import VAE_SIZES, MelVAE
from models.vocoder import VOCODER_SIZES, BigVGAN

SIZE = "small_16k"
GUIDANCE = 4.5
NUM_STEPS = 25
SEGMENTS = 24
"""Of 16 frames, in 8 s of video; one is measured."""
CLIP_FRAMES = 64
"""In 8 s of video; one is measured."""

ORIGINAL_S = {
    "forward float32": 0.73,
    "forward bfloat16": 0.40,
    # Two forwards a step, one candidate at a time.
    "candidate, N = 1, float32": 2 * NUM_STEPS * 0.73,
    "candidate, N = 5, float32": 2 * NUM_STEPS * 0.73,
    "candidate, N = 1, bfloat16": 2 * NUM_STEPS * 0.40,
    "candidate, N = 5, bfloat16": 2 * NUM_STEPS * 0.40,
    "VAE encode": 0.58,
    "VAE decode": 0.76,
    "vocoder": 14.4,
}
"""CPU seconds of MMAudio on a machine of this kind, one thread; candidates are 50 of its forwards."""


@dataclass(frozen=True)
class Case:
    """One figure: `run` is measured, and the figure is `times` of it."""

    name: str
    run: Callable[[], object]
    dtype: torch.dtype = torch.float32
    times: float = 1.0


def matrix_flops_per_s(dtype: torch.dtype, size: int = 2048) -> float:
    """What this thread reaches in a square matrix product, in FLOP a CPU second."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / cpu_seconds(lambda: left @ right)


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    run()
    return time.process_time() - started


def measure(case: Case, repeats: int) -> dict[str, object]:
    """One row; a run warms up and is counted, and the matrix rate is measured before every timed one."""
    with FlopCounterMode(display=False) as counter:
        case.run()
    seconds, rates = [], []
    for _ in range(repeats):
        rates.append(matrix_flops_per_s(case.dtype))
        seconds.append(cpu_seconds(case.run))
    flops = counter.get_total_flops()
    shares = [flops / s / rate for s, rate in zip(seconds, rates, strict=True)]
    median = case.times * statistics.median(seconds)
    original = ORIGINAL_S.get(case.name)
    return {
        "network, 8 s": case.name,
        "CPU s": median,
        "from": case.times * min(seconds),
        "to": case.times * max(seconds),
        "GFLOP": case.times * flops / 1e9,
        "matrix GFLOP/s": statistics.median(rates) / 1e9,
        "share": statistics.median(shares),
        "original CPU s": original if original is not None else "",
        "original / ours": original / median if original is not None else "",
    }


def _quiet(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


def generator_cases() -> Iterator[Case]:
    """Forward and guided candidates; of the 25 Euler steps of a candidate one is measured, since all are alike."""
    network = MMDiT(SIZES[SIZE])
    _quiet(network)
    config = network.config
    features = [
        torch.randn(1, length, dim)
        for length, dim in (
            (config.clip_len, config.clip_dim),
            (config.sync_len, config.sync_dim),
            (config.text_len, config.text_dim),
        )
    ]
    t = torch.tensor([0.3])

    def cases(dtype: torch.dtype, candidates: int) -> Iterator[Case]:
        name = str(dtype).removeprefix("torch.")
        latents = torch.randn(candidates, config.latent_len, config.latent_dim)

        def forward() -> Tensor:
            return network(latents, *features, t)

        def velocity() -> Tensor:
            return network.predict(latents, t, conditions)

        def guided_step() -> Tensor:
            return network.guided_velocity(latents, t, conditions, empty, GUIDANCE)

        network.to(dtype)
        conditions = network.preprocess_conditions(*features)
        empty = network.preprocess_conditions(*network.empty_features(1))
        if candidates == 1:
            yield Case(f"forward {name}", forward, dtype)
            yield Case(f"forward, conditions projected before, {name}", velocity, dtype)
        yield Case(f"candidate, N = {candidates}, {name}", guided_step, dtype, NUM_STEPS / candidates)

    # One network in both dtypes, hence the second's cases are made only when the first's are done.
    for dtype in (torch.float32, torch.bfloat16):
        for candidates in (1, 5):
            yield from cases(dtype, candidates)


def frozen_cases() -> Iterator[Case]:
    """The networks around the generator, each made when its turn comes and freed after it."""
    config = VAE_SIZES["16k"]
    vae = MelVAE(config)
    _quiet(vae)
    vae.fold_weights()
    vae.data_mean.zero_()
    vae.data_std.fill_(1)
    mel, latents = torch.randn(1, config.num_mels, 500), torch.randn(1, config.latent_dim, 250)
    yield Case("VAE encode", lambda: vae.encode(mel))
    yield Case("VAE decode", lambda: vae.decode(latents))
    vocoder = _quiet(BigVGAN(VOCODER_SIZES["16k"]))
    yield Case("vocoder", lambda: vocoder(mel))
    halved = _quiet(BigVGAN(VOCODER_SIZES["16k"])).to(torch.bfloat16)
    yield Case("vocoder bfloat16", lambda: halved(mel.to(torch.bfloat16)), torch.bfloat16)
    synchformer = _quiet(Synchformer(SYNCHFORMER))
    segment = torch.randn(1, 1, 16, 3, 224, 224)
    yield Case("Synchformer", lambda: synchformer(segment), times=SEGMENTS)


def clip_cases() -> Iterator[Case]:
    """CLIP's image tower, one frame of 64."""
    # Its import takes seconds, and nothing else here needs open_clip.
    from models.clip import CLIP_VIT_H_14, FrozenCLIP

    clip = FrozenCLIP(CLIP_VIT_H_14)
    _quiet(clip)
    frame = torch.randn(1, 3, 384, 384)
    yield Case("CLIP, images", lambda: clip.image_embeddings(frame), times=CLIP_FRAMES)
    yield Case("CLIP, caption", lambda: clip.text_states(["a dog barks twice"]))


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "generator": generator_cases,
    "frozen": frozen_cases,
    "clip": clip_cases,
}


def where_time_goes(run: Callable[[], object], num_rows: int = 12) -> list[tuple[str, float, int]]:
    """Operations by their own share of the time: (name, share, calls), the largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    events = record.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:num_rows]
    return [(event.key, event.self_cpu_time_total / total, event.count) for event in largest]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and with --profile say where the time of every figure goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="operations by time, after every figure")
    parser.add_argument("--json", help="write the table as JSON too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    profiles: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for group in options.only:
            for case in CASES[group]():
                row = measure(case, options.repeats)
                sys.stderr.write(f"{case.name}: {row['CPU s']:.3f} CPU s\n")
                if options.profile:
                    profiled = where_time_goes(case.run)
                    profiles[case.name] = {name: round(share, 4) for name, share, _ in profiled}
                    lines = [f"  {share:6.1%} {calls:5} x {name}" for name, share, calls in profiled]
                    sys.stdout.write("\n".join([case.name, *lines]) + "\n")
                rows.append(row)
    show("CPU seconds a clip of 8 s, one thread", rows, options.json, {"share of time by operation": profiles})


if __name__ == "__main__":
    main()
