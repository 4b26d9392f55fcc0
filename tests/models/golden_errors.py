"""Every golden vector against this code, as the table of docs/public-checkpoint.md: its largest error over its RMS.

python -m tests.models.golden_errors FOLDER, the folder with the vectors; they come from outside, and only those that
tests need are kept in tests/fixtures.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.ema import gamma_of_width, power_decay, synthesis_weights
from models.flow_matching import euler_sample, flow_matching_loss, interpolate
from models.mel import MEL_CONFIGS, LogMel
from models.mmdit import SIZES, MMDiT
from models.vae import VAE_SIZES
from pipelines.evaluation.metrics import frechet_distance, inception_score, kl_divergence, kl_divergence_sigmoid
from tests.models.mmdit_golden import TINY_V1, fill_by_rule, relative_error
from tests.models.test_synchformer import golden_segments, golden_synchformer
from tests.models.test_vae import TINY_16K, raw_network
from tests.models.test_vocoder import golden_vocoder

Row = tuple[str, str, float, float]
"""File, vector, error, limit."""


def features(golden: dict[str, Tensor], prefix: str = "") -> tuple[Tensor, Tensor, Tensor]:
    return golden[f"{prefix}in.clip_f"], golden[f"{prefix}in.sync_f"], golden["in.text_f"]


def filled(network: MMDiT) -> MMDiT:
    fill_by_rule(network)
    return network.eval()


@torch.no_grad()
def tiny_velocity(golden: dict[str, Tensor]) -> Iterator[Row]:
    name, network = "mmdit_tiny_v1", filled(MMDiT(TINY_V1))
    flow = network(golden["in.latent"], *features(golden), golden["in.t"])
    yield name, "velocity", relative_error(flow, golden["out.flow"]), 2e-5
    for prefix, given in (("cond", features(golden)), ("empty", network.empty_features(2))):
        made = network.preprocess_conditions(*given)
        pairs = zip(("clip_f", "sync_f", "text_f", "clip_f_c", "text_f_c"), vars(made).values(), strict=True)
        yield name, f"{prefix} projections", max(relative_error(x, golden[f"{prefix}.{n}"]) for n, x in pairs), 2e-5
    xt = interpolate(golden["train.x0"], golden["train.x1_normalized"], golden["in.t"])
    losses = flow_matching_loss(
        network(xt, *features(golden), golden["in.t"]), golden["train.x0"], golden["train.x1_normalized"]
    )
    yield name, "training loss a sample", relative_error(losses, golden["train.loss_per_sample"]), 2e-5
    network.set_lengths(latent_len=37, clip_len=9, sync_len=24)
    flow = network(golden["alt.in.latent"], *features(golden, "alt."), golden["in.t"])
    yield name, "velocity at other lengths", relative_error(flow, golden["alt.out.flow"]), 2e-5


@torch.no_grad()
def tiny_sampler(golden: dict[str, Tensor]) -> Iterator[Row]:
    network = filled(MMDiT(TINY_V1))
    conditions = network.preprocess_conditions(*features(golden))
    clip_f, sync_f, text_f = network.empty_features(2)
    for vector, text, guidance in (
        ("x1_cfg4.5_25steps", text_f, 4.5),
        ("x1_cfg4.5_25steps_negative", golden["in.neg_text"], 4.5),
        ("x1_nocfg_25steps", text_f, 0.5),
    ):
        empty = network.preprocess_conditions(clip_f, sync_f, text)

        def velocity(x: Tensor, t: Tensor, empty=empty, guidance=guidance) -> Tensor:
            return network.guided_velocity(x, t, conditions, empty, guidance)

        x1 = euler_sample(velocity, golden["gen.x0"], num_steps=25)
        yield "mmdit_tiny_v1", vector, relative_error(x1, golden[f"gen.{vector}"]), 1e-3


@torch.no_grad()
def small_16k(golden: dict[str, Tensor]) -> Iterator[Row]:
    network = filled(MMDiT(SIZES["small_16k"]))
    flow = network(golden["in.latent"], *features(golden), golden["in.t"])
    yield "mmdit_small_16k_full", "velocity", relative_error(flow, golden["out.flow"]), 1e-4


@torch.no_grad()
def vae(golden: dict[str, Tensor], full: dict[str, Tensor]) -> Iterator[Row]:
    for name, config, vectors, limit in (
        ("vae_tiny_16k", TINY_16K, golden, 2e-5),
        ("vae_16k_full", VAE_SIZES["16k"], full, 1e-4),
    ):
        network = raw_network(config, golden)
        network.fold_weights()
        mean, std = network.encode(vectors["in.mel"])
        yield name, "mean", relative_error(mean, vectors["enc.mean"]), limit
        yield name, "std", relative_error(std, vectors["enc.std"]), limit
        yield name, "decoded mel", relative_error(network.decode(vectors["in.z"]), vectors["dec.mel"]), limit


@torch.no_grad()
def encoders_and_sound(read: dict[str, dict[str, Tensor]]) -> Iterator[Row]:
    sound = read["bigvgan_16k_tiny"]
    yield "bigvgan_16k_tiny", "wave", relative_error(golden_vocoder()(sound["in.mel"]), sound["out.wave"]), 2e-5
    found = golden_synchformer()(golden_segments())
    yield "synchformer_tiny", "features", relative_error(found, read["synchformer_tiny"]["out"]), 2e-5
    for spec in ("16k", "44k"):
        name = f"mel_{spec}"
        yield (
            name,
            "log-mel",
            relative_error(LogMel(MEL_CONFIGS[spec])(read[name]["in.wave"]), read[name]["out.mel"]),
            1e-4,
        )


def statistics(folder: Path, inputs: dict[str, Tensor]) -> Iterator[Row]:
    expected = json.loads((folder / "metrics.json").read_text())
    generated, truth = inputs["pred_feat"].numpy(), inputs["gt_feat"].numpy()
    logits, reference = inputs["pred_logits"].numpy(), inputs["gt_logits"].numpy()
    mean, spread = inception_score(logits)
    matched = reference[: len(logits)]
    for vector, found, wanted in (
        ("Fréchet distance", frechet_distance(generated, truth), expected["fd"]),
        ("KL, softmax", kl_divergence(matched, logits), expected["kl"]["kl_softmax"]),
        ("KL, sigmoid", kl_divergence_sigmoid(matched, logits), expected["kl"]["kl_sigmoid"]),
        ("inception score", mean, expected["isc"]["inception_score_mean"]),
        ("its deviation", spread, expected["isc"]["inception_score_std"]),
    ):
        yield "metrics", vector, abs(found - wanted) / abs(wanted), 1e-4


def averages(folder: Path) -> Iterator[Row]:
    golden = json.loads((folder / "ema.json").read_text())
    gammas = [(gamma_of_width(float(s)), g) for s, g in golden["gamma(sigma_rel)"].items()]
    yield "ema", "gamma of width", max(abs(a / b - 1) for a, b in gammas), 1e-6
    key = "beta at internal step (sigma_rel 0.05, update_every 1, corrected)"
    decays = [(power_decay(int(s), gamma_of_width(0.05)), b) for s, b in golden[key].items()]
    yield "ema", "decays", max(abs(a - b) for a, b in decays), 1e-6
    solved = golden["example: solve weights"]
    weights = synthesis_weights(solved["t_i"], solved["gamma_i"], solved["t_r"], solved["gamma_r (sigma 0.08)"])
    yield "ema", "synthesis weights", float(np.abs(weights.numpy() - solved["weights"]).max()), 1e-5


def rows(folder: Path) -> Iterator[Row]:
    read = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    yield from tiny_velocity(read["mmdit_tiny_v1"])
    yield from tiny_sampler(read["mmdit_tiny_v1"])
    yield from small_16k(read["mmdit_small_16k_full"])
    yield from vae(read["vae_tiny_16k"], read["vae_16k_full"])
    yield from encoders_and_sound(read)
    yield from statistics(folder, read["metrics"])
    yield from averages(folder)


def main() -> None:
    torch.set_num_threads(1)
    sys.stdout.write("| vectors | what | error | limit |\n|---|---|---|---|\n")
    for file, what, error, limit in rows(Path(sys.argv[1])):
        sys.stdout.write(f"| {file} | {what} | {error:.1e} | {limit:.0e} |{'' if error < limit else ' MISSED'}\n")


if __name__ == "__main__":
    main()
