from pathlib import Path

import pytest
import torch

from models.codec import build_codec, overlap_add
from models.spec import SPECS

SPEC = SPECS["tiny"]


def two_tones() -> torch.Tensor:
    """[2, S]: a beep of 2400 Hz from 0.5 to 0.8 s, and one of 560 Hz from 1.5 to 1.7 s."""
    t = torch.arange(SPEC.num_samples) / SPEC.sample_rate_hz
    first = 0.2 * torch.sin(2 * torch.pi * 2400 * t) * ((t > 0.5) & (t < 0.8))
    second = 0.3 * torch.sin(2 * torch.pi * 560 * t) * ((t > 1.5) & (t < 1.7))
    return torch.stack([first, second])


def test_encode_gives_latents_of_the_spec_with_no_spread() -> None:
    mean, std = build_codec("tiny").encode(two_tones())
    assert mean.shape == std.shape == (2, SPEC.latent_len, SPEC.latent_dim)
    assert not std.any()


def test_a_latent_token_holds_its_own_sixteenth_of_a_second() -> None:
    codec = build_codec("tiny")
    silent, _ = codec.encode(torch.zeros(1, SPEC.num_samples))
    clicks = torch.zeros(1, SPEC.num_samples)
    clicks[0, round(1.0 * SPEC.sample_rate_hz) + 500] = 0.9
    changed = (codec.encode(clicks)[0] - silent).abs().sum(dim=2)[0]
    assert changed.nonzero().flatten().tolist() == [16]


def test_a_decoded_sound_has_the_level_the_time_and_the_pitch_of_the_original() -> None:
    codec = build_codec("tiny")
    waves = two_tones()
    decoded = codec.decode(codec.encode(waves)[0])
    assert decoded.shape == waves.shape
    for wave, again, hz, start, end in zip(waves, decoded, (2400, 560), (0.5, 1.5), (0.8, 1.7), strict=True):
        inside = slice(round(start * 16_000), round(end * 16_000))
        energy = again.square().sum()
        assert again[inside].square().sum() > 0.93 * energy
        assert 0.5 < energy / wave.square().sum() < 2.0
        spectrum = torch.fft.rfft(again).abs()
        assert abs(int(spectrum.argmax()) / 2.5 - hz) < 80


@pytest.mark.parametrize(("n_fft", "hop"), [(512, 250), (512, 128), (64, 64)])
def test_windows_are_added_as_torchs_inverse_stft_adds_them(n_fft: int, hop: int) -> None:
    window = torch.hann_window(n_fft) + 0.1
    spectrum = torch.randn(2, n_fft // 2 + 1, 9, dtype=torch.complex64, generator=torch.Generator().manual_seed(3))
    frames = torch.fft.irfft(spectrum.transpose(1, 2), n_fft) * window
    added = overlap_add(frames, hop) / overlap_add(window.square().expand(1, 9, n_fft), hop).clamp_min(1e-11)
    length = 8 * hop
    expected = torch.istft(spectrum, n_fft, hop, n_fft, window, length=length)
    torch.testing.assert_close(added[:, n_fft // 2 :][:, :length], expected, rtol=1e-5, atol=1e-6)


def test_encoding_a_decoded_sound_gives_nearly_the_same_latents() -> None:
    codec = build_codec("tiny")
    mean, _ = codec.encode(two_tones() + 0.003 * torch.randn(2, SPEC.num_samples, generator=torch.Generator()))
    again, _ = codec.encode(codec.decode(mean))
    assert (again - mean).abs().mean() < 0.1 * mean.std()


def test_decoding_is_deterministic_and_does_not_depend_on_the_batch() -> None:
    codec = build_codec("tiny")
    mean, _ = codec.encode(two_tones())
    torch.manual_seed(1)
    together = codec.decode(mean)
    torch.manual_seed(2)
    alone = torch.cat([build_codec("tiny").decode(mean[i : i + 1]) for i in range(2)])
    # A batch is summed in another order on some processors; half a step of 16 bit is less than a file can keep.
    torch.testing.assert_close(together, alone, atol=1 / 65536, rtol=0)


@pytest.mark.parametrize("level", [-50.0, 0.0, 50.0])
def test_any_latents_decode_to_a_finite_sound_in_range(level: float) -> None:
    decoded = build_codec("tiny").decode(torch.full((1, SPEC.latent_len, SPEC.latent_dim), level))
    assert torch.isfinite(decoded).all()
    assert decoded.abs().max() <= 1.0


def test_an_unknown_spec_and_networks_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no clip spec 'huge'; known are tiny, 16k, 44k"):
        build_codec("huge")
    with pytest.raises(ValueError, match="the codec of spec '44k' needs --weights"):
        build_codec("44k")
    with pytest.raises(ValueError, match=r"holds no vae and no vocoder, .* with --vae FILE --vocoder FILE"):
        build_codec("44k", weights=tmp_path)
    with pytest.raises(ValueError, match=r"holds no vae, .* with --vae FILE$"):
        build_codec("44k", weights=tmp_path, decoding=False)


@pytest.mark.gpu
def test_on_cuda_the_codec_agrees_with_the_cpu() -> None:
    mean, _ = build_codec("tiny").encode(two_tones())
    cuda = build_codec("tiny", "cuda")
    torch.testing.assert_close(cuda.encode(two_tones().cuda())[0].cpu(), mean, atol=1e-3, rtol=0)
    torch.testing.assert_close(cuda.decode(mean.cuda()).cpu(), build_codec("tiny").decode(mean), atol=2e-2, rtol=0)
