import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from models.mel import MEL_CONFIGS
from models.vocoder import VOCODER_SIZES, BigVGAN, VocoderConfig, fold_weight_norm
from models.weights import load_strict
from tests.models.mmdit_golden import fill_by_rule, relative_error, seeded

FORWARD_TOLERANCE = 2e-5  # 9e-6 with oneDNN's convolutions, 1.1e-5 with plain ones; float64 is 1.1e-5 away as well
BF16_RMS_TOLERANCE = 0.07  # 0.043 reached: a hundred layers of rounded sums
TINY_16K = replace(VOCODER_SIZES["16k"], initial_channels=128)
TINY_44K = replace(VOCODER_SIZES["44k"], initial_channels=64)


def filled(vocoder: BigVGAN, gain: float) -> BigVGAN:
    """Synthetic weights by the rule of the golden vectors, the last convolution times `gain`."""
    fill_by_rule(vocoder)
    with torch.no_grad():
        vocoder.conv_post.weight.mul_(gain)
    return vocoder.eval()


def golden_vocoder() -> BigVGAN:
    return filled(BigVGAN(TINY_16K), gain=0.02)


def relative_rms_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.fixture(scope="module")
def vocoder() -> BigVGAN:
    torch.set_num_threads(1)
    return golden_vocoder()


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).parents[1] / "fixtures" / "vocoder" / "bigvgan_16k_tiny.safetensors")


@pytest.fixture(scope="module")
def public() -> dict[str, dict]:
    file = Path(__file__).parents[1] / "fixtures" / "vocoder" / "public_sizes.json.gz"
    return json.loads(gzip.decompress(file.read_bytes()))


def shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


# --- names, shapes, sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", VOCODER_SIZES)
def test_a_named_size_has_exactly_the_public_names_and_shapes(size: str, public: dict[str, dict]) -> None:
    with torch.device("meta"):
        vocoder = BigVGAN(VOCODER_SIZES[size])
    assert shapes(vocoder.state_dict()) == public[size]["shapes"]
    assert {name for name, _ in vocoder.named_buffers()} == set(public[size]["buffers"])
    parameters = list(vocoder.parameters())
    assert sum(p.numel() for p in parameters) == public[size]["parameters"]
    assert all(p.requires_grad for p in parameters)


@pytest.mark.parametrize("size", VOCODER_SIZES)
def test_a_named_size_reads_the_mels_of_its_front_end(size: str) -> None:
    assert VOCODER_SIZES[size].num_mels == MEL_CONFIGS[size].num_mels
    assert VOCODER_SIZES[size].hop == MEL_CONFIGS[size].hop


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upsample_rates": (4, 4)}, "2 upsample_rates, but 6 kernels"),
        ({"upsample_kernels": (8, 8, 4, 4, 4, 5)}, "even number"),
        ({"upsample_kernels": (8, 8, 4, 4, 4, 0)}, "even number"),
        ({"initial_channels": 96}, "cannot be halved 6 times"),
        ({"resblock_kernels": (3, 4)}, "odd"),
    ],
)
def test_a_config_refuses_rates_and_widths_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(VOCODER_SIZES["16k"], **change)


# --- the golden vector: sound of the original network on synthetic weights ----------------------------------------


@torch.no_grad()
def test_the_sound_agrees_with_the_original(vocoder: BigVGAN, golden: dict[str, Tensor]) -> None:
    assert relative_error(vocoder(golden["in.mel"]), golden["out.wave"]) < FORWARD_TOLERANCE


@torch.no_grad()
def test_bf16_vocoders_and_autocast_stay_close_to_float32(vocoder: BigVGAN, golden: dict[str, Tensor]) -> None:
    wave = golden_vocoder().to(torch.bfloat16)(golden["in.mel"].to(torch.bfloat16))
    assert wave.dtype == torch.bfloat16
    assert relative_rms_error(wave, golden["out.wave"]) < BF16_RMS_TOLERANCE
    with torch.autocast("cpu", torch.bfloat16):
        wave = vocoder(golden["in.mel"])
    assert relative_rms_error(wave, golden["out.wave"]) < BF16_RMS_TOLERANCE


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_agrees_with_the_original_in_float32_and_bf16(golden: dict[str, Tensor]) -> None:
    vocoder, mel = golden_vocoder().cuda(), golden["in.mel"].cuda()
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert relative_error(vocoder(mel).cpu(), golden["out.wave"]) < 1e-4
    wave = vocoder.to(torch.bfloat16)(mel.to(torch.bfloat16)).cpu()
    assert relative_rms_error(wave, golden["out.wave"]) < BF16_RMS_TOLERANCE


# --- behaviour ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY_16K, TINY_44K], ids=["16k", "44k"])
@pytest.mark.parametrize("frames", [1, 5])
def test_the_sound_is_frames_times_hop_long_within_one_and_not_silent(config: VocoderConfig, frames: int) -> None:
    wave = filled(BigVGAN(config), gain=0.02)(seeded("mel", (2, config.num_mels, frames)))
    assert wave.shape == (2, 1, frames * config.hop)
    assert 0.01 < wave.std() < 1
    assert wave.abs().max() <= 1


@torch.no_grad()
@pytest.mark.parametrize(("config", "bound"), [(TINY_16K, torch.tanh), (TINY_44K, lambda wave: wave.clamp(-1, 1))])
def test_loud_sound_is_bent_by_tanh_at_16k_and_cut_at_44k(
    config: VocoderConfig, bound: Callable[[Tensor], Tensor]
) -> None:
    vocoder = filled(BigVGAN(config), gain=0.2)
    unbounded: list[Tensor] = []
    vocoder.conv_post.register_forward_hook(lambda *call: unbounded.append(call[-1]))
    wave = vocoder(seeded("mel", (1, config.num_mels, 3)))
    assert unbounded[0].abs().max() > 1.1
    assert torch.equal(wave, bound(unbounded[0]))


@torch.no_grad()
def test_clips_of_a_batch_do_not_hear_each_other(vocoder: BigVGAN) -> None:
    mels = seeded("mels", (2, TINY_16K.num_mels, 4))
    together = vocoder(mels)
    for i in range(2):
        assert relative_error(vocoder(mels[i : i + 1]), together[i : i + 1]) < FORWARD_TOLERANCE


@torch.no_grad()
def test_a_frame_is_heard_where_it_stands(vocoder: BigVGAN) -> None:
    mel = seeded("mel", (1, TINY_16K.num_mels, 80))
    changed = mel.clone()
    changed[..., 40] += 3
    loudness = (vocoder(changed) - vocoder(mel))[0, 0].unflatten(0, (80, TINY_16K.hop)).square().mean(dim=1)
    assert abs(int(loudness.argmax()) - 40) <= 1
    assert torch.cat([loudness[:15], loudness[-15:]]).max() < 1e-9 * loudness.max()


def test_a_mel_of_another_front_end_is_refused(vocoder: BigVGAN) -> None:
    with pytest.raises(AssertionError, match="128 bins, expected 80"):
        vocoder(torch.zeros(1, 128, 4))


# --- weight normalisation -----------------------------------------------------------------------------------------


def in_older_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that torch gave weight-normalised weights before parametrizations."""
    endings = (("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"))
    renamed = {}
    for name, tensor in state.items():
        for newer, older in endings:
            name = name.replace(newer, older)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("older", [False, True], ids=["parametrizations", "weight_g and weight_v"])
@pytest.mark.parametrize("size", VOCODER_SIZES)
def test_published_names_and_shapes_fold_into_exactly_those_of_the_vocoder(
    size: str, older: bool, public: dict[str, dict]
) -> None:
    published = {name: torch.empty(shape, device="meta") for name, shape in public[size]["published"].items()}
    folded = fold_weight_norm(in_older_names(published) if older else published)
    assert shapes(folded) == public[size]["shapes"]


@pytest.mark.parametrize("conv", [nn.Conv1d(6, 4, 3), nn.ConvTranspose1d(6, 4, 8), nn.Linear(6, 4)], ids=repr)
def test_a_folded_weight_is_that_of_torchs_weight_norm(conv: nn.Module) -> None:
    normalised = weight_norm(conv)
    fill_by_rule(normalised)
    state = normalised.state_dict()
    for published in (state, in_older_names(state)):
        folded = fold_weight_norm(published)
        assert folded.keys() == {"weight", "bias"}
        torch.testing.assert_close(folded["weight"], normalised.weight)
        assert folded["bias"] is state["bias"]


@torch.no_grad()
def test_a_vocoder_with_folded_weights_sounds_like_the_published_one(public: dict[str, dict]) -> None:
    published = BigVGAN(TINY_16K)
    for module in list(published.modules()):
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            weight_norm(module)
    fill_by_rule(published)
    published.get_parameter("conv_post.parametrizations.weight.original0").fill_(0.5)
    state = published.state_dict()
    assert state.keys() == public["16k"]["published"].keys()

    plain = BigVGAN(TINY_16K)
    load_strict(plain, fold_weight_norm(in_older_names(state)), "the test")
    mel = seeded("mel", (1, TINY_16K.num_mels, 3))
    assert relative_error(plain(mel), published(mel)) < FORWARD_TOLERANCE


def test_weights_of_half_precision_are_folded_in_float32() -> None:
    gain, direction = seeded("g", (4, 1, 1)).half(), (300 * seeded("v", (4, 90, 7))).half()
    weight = fold_weight_norm({"a.weight_g": gain, "a.weight_v": direction})["a.weight"]
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.norm(dim=(1, 2)), gain.float().abs().flatten())  # the sum exceeds half's range


def test_plain_weights_are_handed_on_as_they_are() -> None:
    state = BigVGAN(TINY_44K).state_dict()
    folded = fold_weight_norm(state)
    assert folded.keys() == state.keys()
    assert all(folded[name] is state[name] for name in state)


G, V = torch.ones(4, 1, 1), torch.ones(4, 3, 5)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.weight_g": G}, "a.weight_g has no a.weight_v"),
        ({"a.weight_v": V}, "no weight can be made of a.weight_v"),
        ({"a.parametrizations.weight.original1": V}, "made of a.parametrizations.weight.original1"),
        ({"a.weight_g": G, "a.parametrizations.weight.original1": V}, "a.weight_g has no a.weight_v"),
        ({"a.weight_g": G, "a.weight_v": V, "a.weight": V}, "a.weight is there twice, plain and as a.weight_g"),
        (
            {"a.weight_g": G, "a.weight_v": V}
            | {"a.parametrizations.weight.original0": G, "a.parametrizations.weight.original1": V},
            "a.weight is there twice",
        ),
        ({"a.parametrizations.bias.original0": G}, "made of a.parametrizations.bias.original0"),
        ({"a.weight_g": G.flatten(), "a.weight_v": V}, r"a.weight_g is \[4\], expected \[4, 1, 1\]"),
        ({"a.weight_g": torch.ones(1, 3, 1), "a.weight_v": V}, r"\[1, 3, 1\], expected \[4, 1, 1\]"),
    ],
)
def test_halves_of_normalised_weights_are_refused_by_name(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fold_weight_norm(state)
