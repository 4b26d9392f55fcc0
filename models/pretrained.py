"""The frozen public networks of one folder, as `import_mmaudio` leaves it: who needs which file, and how it is loaded.

A folder may hold some of them only; what is needed and missing is named.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.clip_synchformer import ClipSynchformerEncoders
from models.spec import ClipSpec
from models.synchformer import SYNCHFORMER, Synchformer
from models.vae import VAE_SIZES, vae_from_public
from models.vae_codec import VAECodec
from models.vocoder import VOCODER_SIZES, BigVGAN
from models.weights import build_loaded, load_weights

Network = TypeVar("Network", bound=nn.Module)

FILE_OF_ROLE = {
    "vae": "vae.safetensors",
    "vocoder": "vocoder.safetensors",
    "synchformer": "synchformer.safetensors",
    "clip": "clip.safetensors",
}
"""What the weights are called. The VAE's are raw as published: they are folded at loading."""
ENCODER_ROLES = ("synchformer", "clip")


def codec_roles(*, decoding: bool) -> tuple[str, ...]:
    """The networks of a codec that only encodes, or that decodes too."""
    return ("vae", "vocoder") if decoding else ("vae",)


def load_codec(spec: ClipSpec, folder: Path | None, device: torch.device | str, *, decoding: bool = True) -> VAECodec:
    """The codec of a named spec; without `decoding` the vocoder is not read.

    Raises:
        ValueError: no folder is given, or a file is missing, broken or of another spec.
    """
    own = _require(folder, codec_roles(decoding=decoding), f"the codec of spec '{spec.name}'")
    vae = vae_from_public(VAE_SIZES[spec.name], _read(own, "vae"), str(own / FILE_OF_ROLE["vae"]))
    vocoder = _load(own, "vocoder", lambda: BigVGAN(VOCODER_SIZES[spec.name])) if decoding else None
    return VAECodec(spec, vae, vocoder).to(device).eval().requires_grad_(False)


def load_encoders(spec: ClipSpec, folder: Path | None, device: torch.device | str) -> ClipSynchformerEncoders:
    """CLIP and Synchformer.

    Raises:
        ValueError: no folder is given, the spec has other conditions, or a file is missing, broken or another network.
    """
    if spec.condition_kind != "clip_synchformer":
        raise ValueError(f"encoders 'clip_synchformer' do not give the conditions of spec '{spec.name}'")
    own = _require(folder, ENCODER_ROLES, "encoders 'clip_synchformer'")
    # Here, because open_clip takes seconds to import and the other presets do without.
    from models.clip import CLIP_VIT_H_14, FrozenCLIP

    clip = _load(own, "clip", lambda: FrozenCLIP(CLIP_VIT_H_14)).to(device)
    synchformer = _load(own, "synchformer", lambda: Synchformer(SYNCHFORMER)).to(device)
    return ClipSynchformerEncoders(spec, clip, synchformer)


def missing_roles(folder: Path, roles: Sequence[str]) -> list[str]:
    """Which of the roles' files are not in the folder."""
    return [role for role in roles if not (folder / FILE_OF_ROLE[role]).is_file()]


def _require(folder: Path | None, roles: Sequence[str], what: str) -> Path:
    if folder is None:
        raise ValueError(f"{what} needs --weights, the folder that jobs/import_mmaudio.py made")
    missing = missing_roles(folder, roles)
    if missing:
        options = " ".join(f"--{role} FILE" for role in missing)
        raise ValueError(
            f"{folder} holds no {' and no '.join(missing)}, which {what} needs: give as --weights a folder that "
            f"jobs/import_mmaudio.py made with {options}"
        )
    return folder


def _read(folder: Path, role: str) -> dict[str, Tensor]:
    return load_weights(folder / FILE_OF_ROLE[role])


def _load(folder: Path, role: str, build: Callable[[], Network]) -> Network:
    module = build_loaded(build, _read(folder, role), str(folder / FILE_OF_ROLE[role]))
    return module.eval().requires_grad_(False)
