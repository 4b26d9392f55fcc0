"""The frozen public networks of one folder, as `import_mmaudio` leaves it: who needs which file, and how it is loaded.

A folder may hold some of them only; what is needed and missing is named.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.clip_synchformer import ClipSynchformerEncoders
from models.spec import ClipSpec
from models.synchformer import SYNCHFORMER, Synchformer
from models.vae import VAE_SIZES, vae_from_public
from models.vae_codec import VAECodec
from models.vocoder import VOCODER_SIZES, BigVGAN
from models.weights import Network, build_loaded, load_weights

FILE_OF_ROLE = {
    "vae": "vae.safetensors",
    "vocoder": "vocoder.safetensors",
    "synchformer": "synchformer.safetensors",
    "clip": "clip.safetensors",
}
"""What the weights are called. The VAE's are raw as published: they are folded at loading."""


def encoder_roles(spec: ClipSpec) -> tuple[str, ...]:
    """The networks of a spec's encoders."""
    return ("synchformer", "clip") if spec.condition_kind == "clip_synchformer" else ()


def codec_roles(spec: ClipSpec, *, decoding: bool) -> tuple[str, ...]:
    """The networks of a spec's codec, if it only encodes or decodes too."""
    if spec.name == "tiny":
        return ()
    return ("vae", "vocoder") if decoding else ("vae",)


def load_codec(spec: ClipSpec, folder: Path | None, device: torch.device | str, *, decoding: bool = True) -> VAECodec:
    """The codec of a named spec; without `decoding` the vocoder is not read.

    Raises:
        ValueError: no folder is given, or a file is missing, broken or of another spec.
    """
    own = _require(folder, codec_roles(spec, decoding=decoding), f"the codec of spec '{spec.name}'")
    vae = vae_from_public(VAE_SIZES[spec.name], _read(own, "vae"), str(own / FILE_OF_ROLE["vae"]))
    vocoder = _load(own, "vocoder", lambda: BigVGAN(VOCODER_SIZES[spec.name])) if decoding else None
    return VAECodec(spec, vae, vocoder).to(device).eval().requires_grad_(False)


def load_encoders(spec: ClipSpec, folder: Path | None, device: torch.device | str) -> ClipSynchformerEncoders:
    """CLIP and Synchformer.

    Raises:
        ValueError: no folder is given, or a file is missing, broken or another network.
    """
    own = _require(folder, encoder_roles(spec), "encoders 'clip_synchformer'")
    # Here, because open_clip takes seconds to import and the other presets do without.
    from models.clip import CLIP_VIT_H_14, FrozenCLIP

    clip = _load(own, "clip", lambda: FrozenCLIP(CLIP_VIT_H_14)).to(device)
    synchformer = _load(own, "synchformer", lambda: Synchformer(SYNCHFORMER)).to(device)
    return ClipSynchformerEncoders(spec, clip, synchformer)


def _require(folder: Path | None, roles: Sequence[str], what: str) -> Path:
    if folder is None:
        raise ValueError(f"{what} needs --weights, the folder that jobs/import_mmaudio.py made")
    missing = [role for role in roles if not (folder / FILE_OF_ROLE[role]).is_file()]
    if missing:
        raise ValueError(f"{folder} holds no {' and no '.join(missing)}, which {what} needs: {how_to_get(missing)}")
    return folder


def how_to_get(roles: Sequence[str]) -> str:
    """What to do about networks that are missing, for a message."""
    options = " ".join(f"--{role} FILE" for role in roles)
    return f"give as --weights a folder that jobs/import_mmaudio.py made with {options}"


def _read(folder: Path, role: str) -> dict[str, Tensor]:
    return load_weights(folder / FILE_OF_ROLE[role])


def _load(folder: Path, role: str, build: Callable[[], Network]) -> Network:
    module = build_loaded(build, _read(folder, role), str(folder / FILE_OF_ROLE[role]))
    return module.eval().requires_grad_(False)
