"""Files as their publishers give them, of tiny networks: the published names, extra keys and weight norm."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.mmdit import SIZES, MMDiT, MMDiTConfig
from models.synchformer import SYNCHFORMER, Synchformer, SynchformerConfig
from models.vae import VAE_SIZES, MelVAE, VAEConfig
from models.vocoder import VOCODER_SIZES, BigVGAN, VocoderConfig
from tests.models.mmdit_golden import TINY_V1, fill_by_rule

OTHER_SIZE = replace(TINY_V1, latent_dim=40)
VAES = {spec: VAEConfig(num_mels=VAE_SIZES[spec].num_mels, latent_dim=4, width=4) for spec in VAE_SIZES}
VOCODERS = {spec: replace(VOCODER_SIZES[spec], initial_channels=64) for spec in VOCODER_SIZES}
SYNCH = SynchformerConfig(width=24, depth=1, num_heads=2, mlp_dim=32)
FILE_NAMES = {
    "network": "mmaudio_small_16k.pth",
    "vae": "v1-16.pth",
    "vocoder": "best_netG.pt",
    "synchformer": "synchformer_state_dict.pth",
}


def use_tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `small_16k` and `small_44k`, and all that belongs to them, be networks of a few thousand weights."""
    monkeypatch.setitem(SIZES, "small_16k", TINY_V1)
    monkeypatch.setitem(SIZES, "small_44k", OTHER_SIZE)
    for spec in ("16k", "44k"):
        monkeypatch.setitem(VAE_SIZES, spec, VAES[spec])
        monkeypatch.setitem(VOCODER_SIZES, spec, VOCODERS[spec])
    monkeypatch.setattr("pipelines.public_models.SYNCHFORMER", SYNCH)


def network_state(config: MMDiTConfig) -> dict[str, Tensor]:
    """With the tables that old files carry."""
    rotations = (config.head_dim // 2, 2, 2)
    return _filled(MMDiT(config)) | {
        "t_embed.freqs": torch.zeros(128),
        "latent_rot": torch.zeros(1, config.latent_len, *rotations),
        "clip_rot": torch.zeros(1, config.clip_len, *rotations),
    }


def vae_state(config: VAEConfig) -> dict[str, Tensor]:
    vae = MelVAE(config)
    vae.data_mean.fill_(-4.0)
    vae.data_std.fill_(2.0)
    return _filled(vae)


def vocoder_state(config: VocoderConfig) -> dict[str, Tensor]:
    """Weight-normalised in torch's older way."""
    published = {}
    for name, tensor in _filled(BigVGAN(config)).items():
        if name.endswith(".weight"):
            published[f"{name}_v"] = tensor
            published[f"{name}_g"] = torch.linspace(0.5, 1.5, len(tensor)).reshape(-1, *[1] * (tensor.ndim - 1))
        else:
            published[name] = tensor
    return published


def synchformer_state(config: SynchformerConfig) -> dict[str, Tensor]:
    """With its other half, which hears."""
    return _filled(Synchformer(config)) | {
        "afeat_extractor.cls_token": torch.zeros(1, 1, 8),
        "transformer.w": torch.ones(2),
    }


def write_published(
    folder: Path,
    network: MMDiTConfig = TINY_V1,
    vae: VAEConfig = VAES["16k"],
    vocoder: VocoderConfig = VOCODERS["16k"],
    synchformer: SynchformerConfig = SYNCH,
) -> dict[str, str]:
    """The four files of one size; returns their paths by role. The defaults are those of `use_tiny_sizes`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {role: str(folder / name) for role, name in FILE_NAMES.items()}
    torch.save(network_state(network), files["network"])
    torch.save(vae_state(vae), files["vae"])
    torch.save({"generator": vocoder_state(vocoder)}, files["vocoder"])
    torch.save(synchformer_state(synchformer), files["synchformer"])
    return files


def write_full_size(folder: Path) -> dict[str, str]:
    """The same at the true shapes of small_16k: 2.4 GB."""
    return write_published(folder, SIZES["small_16k"], VAE_SIZES["16k"], VOCODER_SIZES["16k"], SYNCHFORMER)


def _filled(module: nn.Module) -> dict[str, Tensor]:
    fill_by_rule(module)
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}
