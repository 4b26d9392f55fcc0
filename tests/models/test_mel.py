import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.mel import MEL_CONFIGS, LogMel, MelConfig, mel_filters, sf_cavp_mel

GOLDEN_SAMPLES = {"16k": 16_384, "44k": 45_056}


def golden_wave(name: str) -> torch.Tensor:
    """The golden input: seeded noise beyond [-1, 1], with the first half of its second row silent."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"mel_{name}.wave".encode()))
    wave = 0.5 * torch.randn((2, GOLDEN_SAMPLES[name]), generator=generator)
    wave[1, : wave.shape[1] // 2] = 0
    return wave


@pytest.mark.parametrize("name", ["16k", "44k"])
def test_the_codecs_mels_equal_the_golden_vectors(name: str, fixtures: Path) -> None:
    expected = load_file(fixtures / "world" / f"mel_{name}.safetensors")["out.mel"]
    torch.testing.assert_close(LogMel(MEL_CONFIGS[name])(golden_wave(name)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [MEL_CONFIGS["tiny"], sf_cavp_mel(64)], ids=["tiny", "sf_cavp"])
def test_frame_k_of_a_centred_mel_lies_on_sample_k_times_hop(config: MelConfig) -> None:
    wave = torch.zeros(1, 40_000)
    wave[0, 40 * config.hop] = 1.0
    mel = LogMel(config)(wave)
    assert mel.shape == (1, config.num_mels, 160)
    assert int(mel.mean(dim=1).argmax()) == 40


def test_a_mel_of_n_hops_has_n_frames_and_silence_sits_on_the_floor() -> None:
    for name, num_samples, frames in (("tiny", 40_000, 160), ("16k", 128_000, 500), ("44k", 353_280, 690)):
        config = MEL_CONFIGS[name]
        mel = LogMel(config)(torch.zeros(1, num_samples))
        assert mel.shape == (1, config.num_mels, frames)
    tiny = LogMel(MEL_CONFIGS["tiny"])(torch.zeros(1, 40_000))
    torch.testing.assert_close(tiny.exp(), torch.full_like(tiny, MEL_CONFIGS["tiny"].floor))


def test_a_louder_sound_has_a_larger_mel_in_the_bin_of_its_pitch() -> None:
    config = MEL_CONFIGS["tiny"]
    tone = torch.sin(2 * torch.pi * 880 * torch.arange(40_000) / 16_000)[None]
    quiet, loud = LogMel(config)(0.1 * tone), LogMel(config)(0.2 * tone)
    peak = int(loud.mean(dim=(0, 2)).argmax())
    hz = torch.linspace(0, 8000, 257)
    assert mel_filters(config)[peak, int((hz - 880).abs().argmin())] > 0.4
    # Twice the amplitude is four times the power.
    torch.testing.assert_close((loud - quiet)[0, peak].mean(), torch.tensor(4.0).log(), atol=1e-3, rtol=0)


def test_buffers_of_a_mel_are_in_no_checkpoint() -> None:
    assert LogMel(MEL_CONFIGS["16k"]).state_dict() == {}
