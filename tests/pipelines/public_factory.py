"""Files as their publishers give them, of tiny networks: the published names, extra keys and weight norm."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.clip import CLIP_VIT_H_14, CLIPConfig, FrozenCLIP
from models.mmdit import SIZES, SPEC_OF_SIZE, MMDiT, MMDiTConfig
from models.synchformer import SYNCHFORMER, Synchformer, SynchformerConfig
from models.vae import VAE_SIZES, MelVAE, VAEConfig
from models.vocoder import VOCODER_SIZES, BigVGAN, VocoderConfig
from tests.models.mmdit_golden import TINY_V1, fill_by_rule

OTHER_SIZE = replace(TINY_V1, latent_dim=40)
VAES = {spec: VAEConfig(num_mels=VAE_SIZES[spec].num_mels, latent_dim=4, width=4) for spec in VAE_SIZES}
VOCODERS = {spec: replace(VOCODER_SIZES[spec], initial_channels=64) for spec in VOCODER_SIZES}
SYNCH = SynchformerConfig(width=24, depth=1, num_heads=2, mlp_dim=32)
CLIP = CLIPConfig(
    embed_dim=8,
    image_px=28,
    patch_px=14,
    image_width=16,
    image_depth=1,
    image_head_width=16,
    text_width=16,
    text_depth=1,
    text_heads=2,
    vocabulary=64,
)
FILE_NAMES = {
    "network": "mmaudio_small_16k.pth",
    "vae": "v1-16.pth",
    "vocoder": "best_netG.pt",
    "synchformer": "synchformer_state_dict.pth",
    "clip": "open_clip_pytorch_model.bin",
}
NARROW_NETWORK = replace(SIZES["small_16k"], hidden_dim=64, num_heads=1, depth=3, fused_depth=2)
NARROW_VAE = replace(VAES["16k"], latent_dim=20)
NARROW_SYNCH = SynchformerConfig(width=768, depth=1, num_heads=12, mlp_dim=768)
NARROW_CLIP = replace(CLIP_VIT_H_14, image_width=16, image_depth=1, image_head_width=16, text_depth=1)
"""Few layers and little inside, but what goes in and out has the true widths and lengths of small_16k."""


def use_tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `small_16k` and `small_44k`, and all that belongs to them, be networks of a few thousand weights."""
    monkeypatch.setitem(SIZES, "small_16k", TINY_V1)
    monkeypatch.setitem(SIZES, "small_44k", OTHER_SIZE)
    for spec in ("16k", "44k"):
        monkeypatch.setitem(VAE_SIZES, spec, VAES[spec])
        monkeypatch.setitem(VOCODER_SIZES, spec, VOCODERS[spec])
    monkeypatch.setattr("pipelines.public_models.SYNCHFORMER", SYNCH)
    monkeypatch.setattr("models.clip.CLIP_VIT_H_14", CLIP)


def use_narrow_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `small_16k` be networks with the true shapes of everything that passes between them."""
    monkeypatch.setitem(SIZES, "small_16k", NARROW_NETWORK)
    monkeypatch.setitem(VAE_SIZES, "16k", NARROW_VAE)
    monkeypatch.setitem(VOCODER_SIZES, "16k", VOCODERS["16k"])
    monkeypatch.setattr("pipelines.public_models.SYNCHFORMER", NARROW_SYNCH)
    monkeypatch.setattr("models.pretrained.SYNCHFORMER", NARROW_SYNCH)
    monkeypatch.setattr("models.clip.CLIP_VIT_H_14", NARROW_CLIP)


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
            # A loud last convolution would saturate: sound that is clipped throughout is refused by every reward.
            scale = 1.3 / config.initial_channels if name == "conv_post.weight" else 1.0
            gains = scale * torch.linspace(0.5, 1.5, len(tensor))
            published[f"{name}_g"] = gains.reshape(-1, *[1] * (tensor.ndim - 1))
        else:
            published[name] = tensor
    return published


def synchformer_state(config: SynchformerConfig) -> dict[str, Tensor]:
    """With its other half, which hears."""
    return _filled(Synchformer(config)) | {
        "afeat_extractor.cls_token": torch.zeros(1, 1, 8),
        "transformer.w": torch.ones(2),
    }


def clip_state(config: CLIPConfig) -> dict[str, Tensor]:
    return _filled(FrozenCLIP(config))


def write_published(
    folder: Path,
    network: MMDiTConfig = TINY_V1,
    vae: VAEConfig = VAES["16k"],
    vocoder: VocoderConfig = VOCODERS["16k"],
    synchformer: SynchformerConfig = SYNCH,
    clip: CLIPConfig = CLIP,
    roles: Sequence[str] = tuple(FILE_NAMES),
) -> dict[str, str]:
    """The files of one size; returns their paths by role. The defaults are those of `use_tiny_sizes`."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "network": lambda: network_state(network),
        "vae": lambda: vae_state(vae),
        "vocoder": lambda: {"generator": vocoder_state(vocoder)},
        "synchformer": lambda: synchformer_state(synchformer),
        "clip": lambda: clip_state(clip),
    }
    files = {role: str(folder / FILE_NAMES[role]) for role in roles}
    for role, path in files.items():
        torch.save(contents[role](), path)
    return files


def write_narrow(folder: Path) -> dict[str, str]:
    """The same for `use_narrow_sizes`: 300 MB, most of it word pieces."""
    return write_published(folder, NARROW_NETWORK, NARROW_VAE, VOCODERS["16k"], NARROW_SYNCH, NARROW_CLIP)


def write_full_size(folder: Path, size: str, roles: Sequence[str] = tuple(FILE_NAMES)) -> dict[str, str]:
    """The same at the true shapes of a named size: 6 GB, of which CLIP is 4."""
    free_gib = shutil.disk_usage(folder.parent).free / 2**30
    # These files, what they are imported into, and some for the tests beside: a full disk would fail those as well.
    assert free_gib > 15, (
        f"{folder.parent} has {free_gib:.1f} GiB of free disk and 15 are needed: free some or set TMPDIR"
    )
    spec = SPEC_OF_SIZE[size]
    return write_published(folder, SIZES[size], VAE_SIZES[spec], VOCODER_SIZES[spec], SYNCHFORMER, CLIP_VIT_H_14, roles)


def _filled(module: nn.Module) -> dict[str, Tensor]:
    fill_by_rule(module)
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}
