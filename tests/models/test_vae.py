import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.mel import MEL_CONFIGS
from models.spec import SPECS
from models.vae import (
    LOGVAR_RANGE,
    VAE_SIZES,
    MelVAE,
    MPConv1d,
    VAEConfig,
    mp_silu,
    mp_sum,
    pixel_norm,
    vae_from_public,
)
from tests.models.mmdit_golden import fill_by_rule, relative_error, seeded

TINY_16K = VAEConfig(num_mels=80, latent_dim=20, width=32)
TINY_TOLERANCE = 2e-5  # 2e-6 reached: float32 accumulation order
FULL_TOLERANCE = 1e-4  # 4e-6 reached
BF16_TOLERANCE = 0.03  # RMS of the error over the RMS of what is expected; 0.015 reached by the mean, 0.008 by others


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    torch.set_num_threads(1)
    return load_file(Path(__file__).parents[1] / "fixtures" / "vae" / "tiny_16k.safetensors")


def raw_network(config: VAEConfig, golden: dict[str, Tensor]) -> MelVAE:
    """Raw weights by the rule of the golden vectors; the 16k mel statistics are those of the public file."""
    vae = MelVAE(config).eval().requires_grad_(False)
    vae.load_state_dict({"data_mean": golden["param.data_mean"], "data_std": golden["param.data_std"]}, strict=False)
    fill_by_rule(vae)
    return vae


def raw_state(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in raw_network(TINY_16K, golden).state_dict().items()}


@pytest.fixture(scope="module")
def vae(golden: dict[str, Tensor]) -> MelVAE:
    return vae_from_public(TINY_16K, raw_state(golden), "the rule")


def rms_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


# --- names, shapes, sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", VAE_SIZES)
def test_a_vae_has_exactly_the_public_names_and_shapes(size: str, fixtures: Path) -> None:
    public = json.loads(gzip.decompress((fixtures / "vae" / "public_sizes.json.gz").read_bytes()))[size]
    with torch.device("meta"):
        vae = MelVAE(VAE_SIZES[size])
    assert {name: list(tensor.shape) for name, tensor in vae.state_dict().items()} == public["shapes"]
    assert [name for name, _ in vae.named_buffers()] == public["buffers"]
    assert sum(p.numel() for p in vae.parameters() if p.requires_grad) == public["parameters"]


@pytest.mark.parametrize("size", VAE_SIZES)
def test_a_vae_turns_the_mel_of_its_clip_spec_into_the_latents_of_the_spec_and_back(size: str) -> None:
    spec, num_mels = SPECS[size], MEL_CONFIGS[size].num_mels
    frames = spec.latent_len * spec.mel_frames_per_latent
    with torch.device("meta"):
        vae = MelVAE(VAE_SIZES[size])
        vae.fold_weights()
        mean, std = vae.encode(torch.empty(3, num_mels, frames))
    assert mean.shape == std.shape == (3, spec.latent_dim, spec.latent_len)
    assert vae.decode(mean).shape == (3, num_mels, frames)


# --- the golden vectors: outputs of the original networks on synthetic weights ---------------------------------------


@torch.no_grad()
def test_the_posterior_agrees_with_the_original(vae: MelVAE, golden: dict[str, Tensor]) -> None:
    mean, logvar = vae.moments(golden["in.mel"])
    assert relative_error(mean, golden["enc.mean"]) < TINY_TOLERANCE
    assert relative_error(logvar, golden["enc.logvar"]) < TINY_TOLERANCE
    same_mean, std = vae.encode(golden["in.mel"])
    assert torch.equal(same_mean, mean)
    assert relative_error(std, golden["enc.std"]) < TINY_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(("latents", "mel"), [("in.z", "dec.mel"), ("enc.mean", "dec_of_mean.mel")])
def test_decoded_mels_agree_with_the_original(latents: str, mel: str, vae: MelVAE, golden: dict[str, Tensor]) -> None:
    assert relative_error(vae.decode(golden[latents]), golden[mel]) < TINY_TOLERANCE


def test_a_folded_weight_agrees_with_the_original(vae: MelVAE, golden: dict[str, Tensor]) -> None:
    weight = vae.encoder.conv_in.weight
    assert relative_error(weight, golden["conv_in_effective_weight"]) < 2e-6
    # What the fold does is a hundred times what is tolerated: a raw weight would not pass.
    assert relative_error(raw_network(TINY_16K, golden).encoder.conv_in.weight, weight) > 2e-4


@pytest.mark.slow
@torch.no_grad()
def test_the_full_16k_vae_agrees_with_the_original(fixtures: Path, golden: dict[str, Tensor]) -> None:
    full = load_file(fixtures / "vae" / "16k_full.safetensors")
    vae = raw_network(VAE_SIZES["16k"], golden)
    vae.fold_weights()
    mean, std = vae.encode(full["in.mel"])
    assert relative_error(mean, full["enc.mean"]) < FULL_TOLERANCE
    assert relative_error(std, full["enc.std"]) < FULL_TOLERANCE
    assert relative_error(vae.decode(full["in.z"]), full["dec.mel"]) < FULL_TOLERANCE
    vae.to(torch.bfloat16)
    mean, std = vae.encode(full["in.mel"])
    assert rms_error(mean, full["enc.mean"]) < BF16_TOLERANCE
    assert rms_error(std, full["enc.std"]) < BF16_TOLERANCE
    assert rms_error(vae.decode(full["in.z"]), full["dec.mel"]) < BF16_TOLERANCE


@torch.no_grad()
def test_a_bf16_vae_stays_close_to_float32_and_gives_float32(golden: dict[str, Tensor]) -> None:
    halved = vae_from_public(TINY_16K, raw_state(golden), "the rule").to(torch.bfloat16)
    mean, std = halved.encode(golden["in.mel"])
    mel = halved.decode(golden["in.z"])
    assert mean.dtype == std.dtype == mel.dtype == torch.float32
    assert rms_error(mean, golden["enc.mean"]) < BF16_TOLERANCE
    assert rms_error(std, golden["enc.std"]) < BF16_TOLERANCE
    assert rms_error(mel, golden["dec.mel"]) < BF16_TOLERANCE


# --- folding and loading ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_folding_twice_is_folding_once(golden: dict[str, Tensor]) -> None:
    vae = raw_network(TINY_16K, golden)
    # Raw rows far from where the fold brings them: folding those of the rule again would hardly show.
    vae.encoder.conv_in.weight.mul_(100)
    vae.fold_weights()
    once = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    vae.fold_weights()
    assert all(torch.equal(tensor, once[name]) for name, tensor in vae.state_dict().items())
    # And not because the arithmetic would change nothing the second time.
    vae.encoder.conv_in.fold()
    assert relative_error(vae.encoder.conv_in.weight, once["encoder.conv_in.weight"]) > 1e-3


@torch.no_grad()
def test_raw_weights_are_refused_until_they_are_folded(golden: dict[str, Tensor]) -> None:
    vae = raw_network(TINY_16K, golden)
    with pytest.raises(RuntimeError, match="fold_weights"):
        vae.encode(golden["in.mel"])
    with pytest.raises(RuntimeError, match="fold_weights"):
        vae.decode(golden["in.z"])


@torch.no_grad()
def test_weights_loaded_into_a_folded_network_are_raw_and_are_folded_anew(golden: dict[str, Tensor]) -> None:
    vae = MelVAE(TINY_16K).requires_grad_(False)
    vae.fold_weights()
    wrapped = torch.nn.ModuleDict({"vae": vae})
    wrapped.load_state_dict({f"vae.{name}": tensor for name, tensor in raw_state(golden).items()})
    with pytest.raises(RuntimeError, match="fold_weights"):
        vae.decode(golden["in.z"])
    vae.fold_weights()
    assert relative_error(vae.decode(golden["in.z"]), golden["dec.mel"]) < TINY_TOLERANCE


def test_a_folded_row_has_the_same_rms_whatever_its_raw_scale() -> None:
    conv = MPConv1d(12, 7, 3)
    with torch.no_grad():
        conv.weight.mul_(torch.logspace(1, 5, 7)[:, None, None])
    conv.fold()
    rms = conv.weight.detach().square().mean(dim=(1, 2)).sqrt()
    torch.testing.assert_close(rms, torch.full((7,), 36**-0.5), rtol=3e-5, atol=0)


def test_folding_is_float32_arithmetic_in_a_bf16_network() -> None:
    conv, halved = MPConv1d(64, 16, 3), MPConv1d(64, 16, 3).to(torch.bfloat16)
    raw = seeded("conv", (16, 64, 3)).to(torch.bfloat16)
    conv.load_state_dict({"weight": raw})
    halved.load_state_dict({"weight": raw})
    conv.fold()
    halved.fold()
    assert torch.equal(halved.weight, conv.weight.to(torch.bfloat16))


def test_a_public_state_dict_loads_strictly_and_is_left_as_it_was(golden: dict[str, Tensor]) -> None:
    state, untouched = raw_state(golden), raw_state(golden)
    vae = vae_from_public(TINY_16K, state, "v1-16.pth")
    assert all(torch.equal(state[name], untouched[name]) for name in untouched)
    assert not vae.training
    assert not any(p.requires_grad for p in vae.parameters())
    weight = state.pop("decoder.conv_in.weight")
    with pytest.raises(ValueError, match=r"v1-16\.pth.*missing.*decoder\.conv_in\.weight"):
        vae_from_public(TINY_16K, state, "v1-16.pth")
    with pytest.raises(ValueError, match=r"unknown.*decoder\.conv_in\.bias"):
        vae_from_public(TINY_16K, state | {"decoder.conv_in.weight": weight, "decoder.conv_in.bias": weight}, "a file")
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.weight \[128, 20\] instead of \[128, 20, 3\]"):
        vae_from_public(TINY_16K, state | {"decoder.conv_in.weight": weight[..., 0]}, "a file")


# --- behaviour ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_log_variances_are_clamped_so_that_the_deviation_stays_positive_and_finite(golden: dict[str, Tensor]) -> None:
    vae = vae_from_public(TINY_16K, raw_state(golden), "the rule")
    vae.encoder.learnable_gain.fill_(1000.0)
    mean, logvar = vae.moments(golden["in.mel"])
    assert (logvar.min().item(), logvar.max().item()) == LOGVAR_RANGE == (-30.0, 20.0)
    assert mean.abs().max() > 100  # means are not clamped
    _, std = vae.encode(golden["in.mel"])
    torch.testing.assert_close(torch.stack([std.min(), std.max()]), torch.tensor([-15.0, 10.0]).exp())


@torch.no_grad()
def test_learnable_gains_scale_the_last_weights_by_one_plus_the_gain(golden: dict[str, Tensor]) -> None:
    vae = vae_from_public(TINY_16K, raw_state(golden), "the rule")
    before = (vae.decode(golden["in.z"]) - vae.data_mean) / vae.data_std
    gain = vae.decoder.learnable_gain.item()
    vae.decoder.learnable_gain.fill_(1 + 2 * gain)  # 1 + this is twice 1 + gain
    after = (vae.decode(golden["in.z"]) - vae.data_mean) / vae.data_std
    torch.testing.assert_close(after, 2 * before, rtol=1e-4, atol=1e-5)


def test_elementary_layers_keep_the_magnitude_of_unit_noise() -> None:
    a, b = seeded("a", (4, 64, 500)), seeded("b", (4, 64, 500))
    for out in (mp_silu(a), mp_sum(a, b), pixel_norm(37 * a, (1,)), _convolved(a)):
        assert out.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.02)


@torch.no_grad()
def _convolved(x: Tensor) -> Tensor:
    conv = MPConv1d(64, 64, 3)
    conv.weight.copy_(seeded("weight", (64, 64, 3)))
    conv.fold()
    return conv(x)


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other(vae: MelVAE, golden: dict[str, Tensor]) -> None:
    mean, _ = vae.encode(golden["in.mel"])
    for i in range(2):
        alone, _ = vae.encode(golden["in.mel"][i : i + 1])
        assert relative_error(alone, mean[i : i + 1]) < TINY_TOLERANCE


@torch.no_grad()
def test_mels_and_latents_of_another_shape_are_refused(vae: MelVAE) -> None:
    with pytest.raises(AssertionError, match="63 mel frames"):
        vae.encode(torch.zeros(1, 80, 63))
    with pytest.raises(AssertionError, match="128 mel bins"):
        vae.encode(torch.zeros(1, 128, 64))
    with pytest.raises(AssertionError, match="40 channels"):
        vae.decode(torch.zeros(1, 40, 32))


def test_a_vae_without_weights_gives_nan_instead_of_a_sound() -> None:
    vae = MelVAE(TINY_16K)
    vae.fold_weights()
    assert vae.decode(torch.zeros(1, 20, 4)).isnan().all()
