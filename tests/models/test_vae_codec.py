from dataclasses import replace

import pytest
import torch

from models.mel import MEL_CONFIGS, LogMel
from models.spec import SPECS
from models.vae import VAE_SIZES, MelVAE, VAEConfig, vae_from_public
from models.vae_codec import VAECodec
from models.vocoder import VOCODER_SIZES, BigVGAN
from tests.models.mmdit_golden import fill_by_rule, seeded


def codec(name: str, *, vocoder: bool = True) -> VAECodec:
    """A narrow codec of a named spec, by the golden fill rule."""
    config = VAEConfig(num_mels=VAE_SIZES[name].num_mels, latent_dim=SPECS[name].latent_dim, width=4)
    raw = MelVAE(config)
    raw.data_mean.fill_(-4.0)
    raw.data_std.fill_(2.0)
    fill_by_rule(raw)
    vae = vae_from_public(config, {k: v.detach().clone() for k, v in raw.state_dict().items()}, "rule")
    sound = None
    if vocoder:
        sound = BigVGAN(replace(VOCODER_SIZES[name], initial_channels=64))
        fill_by_rule(sound)
    return VAECodec(SPECS[name], vae, sound).eval()


@pytest.mark.parametrize("name", ["16k", "44k"])
def test_a_clip_has_the_tokens_and_the_samples_of_its_spec(name: str) -> None:
    spec, made = SPECS[name], codec(name)
    mean, std = made.encode(0.1 * seeded("wave", (1, spec.num_samples)))
    assert mean.shape == std.shape == (1, spec.latent_len, spec.latent_dim)
    assert float(std.min()) > 0
    short = made.decode(mean[:, :3])
    assert short.shape == (1, 3 * spec.mel_hop * spec.mel_frames_per_latent)
    assert float(short.abs().max()) <= 1


def test_encoding_is_the_vae_behind_the_mel_of_its_own_front_end() -> None:
    made = codec("16k", vocoder=False)
    wave = 0.1 * seeded("wave", (2, 5120))
    mean, _ = made.encode(wave)
    expected, _ = made.vae.encode(LogMel(MEL_CONFIGS["16k"])(wave))
    torch.testing.assert_close(mean, expected.transpose(1, 2))


def test_a_sound_does_not_depend_on_its_neighbours() -> None:
    made = codec("16k")
    latents = seeded("latents", (3, 4, 20))
    assert torch.equal(made.decode(latents)[1:2], made.decode(latents[1:2]))


def test_a_token_sounds_in_its_own_place() -> None:
    made = codec("16k")
    latents = seeded("latents", (1, 40, 20))
    changed = latents.clone()
    changed[:, 20] += 1
    difference = (made.decode(changed) - made.decode(latents))[0].abs()
    assert float(difference[20 * 512 : 21 * 512].max()) > 0
    assert int(difference.argmax()) // 512 in range(14, 27)


def test_what_cannot_be_coded_is_said() -> None:
    made = codec("16k", vocoder=False)
    with pytest.raises(ValueError, match="700 samples are no whole number of latent tokens of 512"):
        made.encode(torch.zeros(1, 700))
    with pytest.raises(ValueError, match="without a vocoder"):
        made.decode(torch.zeros(1, 2, 20))
