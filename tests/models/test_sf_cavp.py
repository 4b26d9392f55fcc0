"""SF-CAVP's encoders: sizes, clocks, the definitions of how vectors are compared."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.sf_cavp import (
    SF_CAVP_SIZES,
    SFCAVP,
    Encoder,
    clip_vector,
    normalise_loudness,
    offset_similarity,
    parameter_groups,
    semantic_similarity,
    temporal_contrast,
)


@pytest.fixture(scope="module")
def tiny() -> SFCAVP:
    torch.manual_seed(0)
    return SFCAVP(SF_CAVP_SIZES["tiny"])


def test_the_tiny_size_has_the_specified_number_of_parameters(tiny) -> None:
    video, audio = (sum(p.numel() for p in encoder.parameters()) for encoder in (tiny.video, tiny.audio))
    # The specified 213,560 and 131,800, the latter with heads that see four bands of frequency apart.
    bands = 4 * (144 * 128 + 24 * 64)
    assert (video, audio) == (213_560, 131_800 + bands)
    assert sum(p.numel() for p in tiny.parameters()) == 345_360 + bands + 2  # and the two learned scales


def test_picture_and_sound_of_a_demo_clip_share_their_clock(tiny) -> None:
    video = tiny.encode_video(torch.rand(2, 40, 3, 64, 64))
    audio = tiny.encode_audio(torch.randn(2, 40_000) * 0.1)
    assert video.slow.shape == audio.slow.shape == (2, 10, 128)
    assert video.fast.shape == audio.fast.shape == (2, 40, 64)


def test_the_base_size_has_vectors_of_16_and_4_hz() -> None:
    config = SF_CAVP_SIZES["base"]
    with torch.device("meta"):
        video = Encoder(config.video, config)(torch.empty(1, 3, 64, config.frame_px, config.frame_px))
        audio = Encoder(config.audio, config)(torch.empty(1, 1, 256, config.num_mels))
    assert video.slow.shape == audio.slow.shape == (1, 16, 512)
    assert video.fast.shape == audio.fast.shape == (1, 64, 256)


def test_frames_are_average_pooled_to_the_size_of_the_trunk(tiny) -> None:
    frames = torch.rand(1, 8, 3, 64, 64)
    small = F.avg_pool2d(frames[0], 2)[None]
    torch.testing.assert_close(tiny.pool_frames(frames), small)
    assert tiny.pool_frames(small) is small


def test_the_tiny_audio_encoder_tells_a_high_tone_from_a_low_one_before_any_training(tiny) -> None:
    """Only because its heads see bands of frequency apart: far from the borders the trunk treats all pitches alike."""
    low, high = (torch.full((1, 64, 96), -10.0) for _ in range(2))
    low[:, 20:24, 40:56], high[:, 36:40, 40:56] = 0.0, 0.0
    pitch_blind = Encoder(tiny.config.audio, tiny.config)
    pitch_blind.trunk.load_state_dict(tiny.audio.trunk.state_dict())

    def distance(encoder: Encoder) -> float:
        a, b = (encoder(x.transpose(1, 2)[:, None]).slow for x in (low, high))
        return float((a - b).detach().norm() / a.detach().norm())

    assert distance(tiny.audio) > 3 * distance(pitch_blind)


def test_fitting_is_the_same_whatever_the_gain_and_standardises_the_mel(tiny) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(4, 16, 3, 32, 32, generator=generator)
    waves = 0.05 * torch.randn(4, 16_000, generator=generator)
    tiny.fit(frames, waves)
    mean = tiny.mel_mean.clone()
    log_mel = tiny.log_mel(normalise_loudness(waves))
    standard = (log_mel - tiny.mel_mean[:, None]) / tiny.mel_std[:, None]
    torch.testing.assert_close(standard.mean(dim=(0, 2)), torch.zeros(64), atol=1e-4, rtol=0)
    tiny.fit(frames, waves * 2)
    torch.testing.assert_close(tiny.mel_mean, mean, atol=1e-4, rtol=1e-4)


def test_a_clip_vector_is_the_direction_of_mean_plus_maximum() -> None:
    slow = torch.tensor([[[3.0, 0.0], [1.0, 0.0], [-1.0, 4.0]]])
    torch.testing.assert_close(clip_vector(slow), F.normalize(torch.tensor([[1.0 + 3.0, 4 / 3 + 4.0]]), dim=-1))


def test_the_similarity_peaks_at_the_offset_and_a_positive_one_means_late_sound() -> None:
    torch.manual_seed(0)
    timeline = torch.randn(1, 60, 16)
    offsets = torch.arange(-8, 9)
    video = timeline[:, 10:40]
    for late in (-5, 0, 7):
        audio = timeline[:, 10 - late : 40 - late]  # what is seen at t sounds at t + late
        similarity = offset_similarity(video, audio, offsets)
        assert offsets[similarity.argmax()] == late
        assert similarity.max() == pytest.approx(1.0, abs=1e-5)


def test_the_similarity_is_the_mean_of_a_diagonal() -> None:
    torch.manual_seed(0)
    video, audio = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    products = F.normalize(video, dim=-1) @ F.normalize(audio, dim=-1).transpose(1, 2)
    offsets = torch.tensor([-3, 0, 2])
    expected = [torch.diagonal(products, int(d), 1, 2).mean(dim=1) for d in offsets]
    torch.testing.assert_close(offset_similarity(video, audio, offsets), torch.stack(expected, dim=1))


def test_the_contrast_is_nought_for_steady_sound() -> None:
    video, audio = torch.ones(1, 20, 4), torch.ones(1, 20, 4)
    offsets = torch.arange(-6, 7)
    assert temporal_contrast(offset_similarity(video, audio, offsets), offsets).item() == pytest.approx(0, abs=1e-6)
    similarity = torch.tensor([[0.5, 0.9, 0.9, 0.9, 1.0, 0.9, 0.9, 0.9, 0.3]])
    assert temporal_contrast(similarity, torch.arange(-4, 5)).item() == pytest.approx(1.0 - 0.4)


def test_loudness_is_normalised_whatever_the_gain_and_silence_stays() -> None:
    wave = torch.randn(1, 1000)
    torch.testing.assert_close(normalise_loudness(wave * 0.01), normalise_loudness(wave))
    assert 20 * math.log10(normalise_loudness(wave).square().mean().sqrt()) == pytest.approx(-26, abs=0.05)
    assert normalise_loudness(torch.zeros(1, 1000)).abs().max() == 0


def test_only_matrices_and_kernels_decay(tiny) -> None:
    decayed, rest = parameter_groups(tiny, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in tiny.named_parameters()}
    kept = {names[id(p)] for p in rest["params"]}
    assert {"log_scale_slow", "log_scale_fast"} <= kept
    assert all(name.endswith((".bias", ".weight")) or "scale" in name for name in kept)
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


def test_scales_start_at_the_usual_temperature_and_are_capped() -> None:
    model = SFCAVP(SF_CAVP_SIZES["tiny"])
    assert [scale.item() for scale in model.scales()] == pytest.approx([1 / 0.07] * 2)
    with torch.no_grad():
        model.log_scale_fast.fill_(9.0)
    assert model.scales()[1].item() == 100


def test_the_semantic_similarity_is_half_of_the_whole_and_half_of_the_steps() -> None:
    video, audio = torch.randn(2, 3, 10, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(semantic_similarity(video, video), torch.ones(3))
    pooled = F.cosine_similarity(clip_vector(video), clip_vector(audio), dim=-1)
    by_step = torch.stack([F.cosine_similarity(video[:, t], audio[:, t], dim=-1) for t in range(10)], dim=1).mean(dim=1)
    torch.testing.assert_close(semantic_similarity(video, audio), (pooled + by_step) / 2)
    torch.testing.assert_close(semantic_similarity(7.0 * video, 0.1 * audio), semantic_similarity(video, audio))


def test_the_right_things_at_the_wrong_times_keep_the_pooled_half_alone() -> None:
    """One direction a step: the same set of steps in another order has no step in its place."""
    video = torch.eye(6)[None]
    late = video.roll(1, dims=1)
    torch.testing.assert_close(semantic_similarity(video, late), torch.tensor([0.5]))
    half = torch.cat([video[:, :3], video[:, 3:].roll(1, dims=1)], dim=1)
    torch.testing.assert_close(semantic_similarity(video, half), torch.tensor([0.75]))
