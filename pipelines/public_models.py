"""The published networks: the file that each comes in, its md5 and licence, and what its weights have to fit.

A role is the part a network plays (`network`, `vae`, `vocoder`, `synchformer`, `clip`); within it a variant is a
policy's size (`network`), a clip spec (`vae`, `vocoder`), or the only one there is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.mmdit import SIZES, SPEC_OF_SIZE, MMDiT
from models.synchformer import SYNCHFORMER, Synchformer
from models.vae import VAE_SIZES, MelVAE
from models.vocoder import VOCODER_SIZES, BigVGAN, fold_weight_norm
from models.weights import load_strict, without_legacy_mmdit_keys
from pipelines.errors import InputError
from pipelines.public_files import FileIdentity

ROLES = ("network", "vae", "vocoder", "synchformer", "clip")
ANY_SIZE = "any size"
PREFIX = "vfeat_extractor."
"""Of the whole Synchformer only its visual encoder is used; its keys begin so."""

MAX_NAMES_IN_ERROR = 5
NON_COMMERCIAL = "CC-BY-NC 4.0 (MMAudio's checkpoints): no commercial use"


@dataclass(frozen=True, kw_only=True)
class PublicModel:
    """One published network."""

    role: str
    variant: str
    file_name: str
    """What its publisher calls the file."""
    md5: str | None
    """Of that file; None where none is on record."""
    licence: str
    """Of the weights."""
    build: Callable[[], nn.Module]
    """Makes the module; it is built without memory, on the meta device."""
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """Published state dict -> that of our module; raises ValueError where it cannot."""
    entry: str | None = None
    """Under which name the file holds the state dict, if it holds more than that."""

    @property
    def title(self) -> str:
        """What it is, for a message."""
        return f"the {self.role} of {self.variant} ({self.file_name})"

    def fits(self, state: dict[str, Tensor]) -> bool:
        """Whether a published state dict has exactly this network's names and shapes."""
        try:
            self._load_shapes(self.rename(state), "")
        except ValueError:
            return False
        return True

    def checked(self, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """Our module's state dict of a published one: every name, every shape, every number finite.

        Raises:
            InputError: names the first weights that are missing, unknown, of another shape or not finite.
        """
        try:
            renamed = self.rename(state)
            self._load_shapes(renamed, source)
        except ValueError as error:
            raise InputError(f"{error}; wanted is {self.title}") from error
        broken = sorted(name for name, tensor in renamed.items() if not torch.isfinite(tensor).all())
        if broken:
            raise InputError(f"{source}: {_not_finite(broken)}")
        return renamed

    def _load_shapes(self, renamed: dict[str, Tensor], source: str) -> None:
        with torch.device("meta"):
            module = self.build()
        load_strict(module, {name: tensor.to("meta") for name, tensor in renamed.items()}, source)


def _not_finite(names: list[str]) -> str:
    statistics = [name for name in names if name in ("latent_mean", "latent_std")]
    if len(statistics) == len(names):
        return (
            f"{' and '.join(statistics)} not finite: the statistics of the latents were never set in these weights; "
            "give the published ones, or set the statistics of the codec's latents in the file"
        )
    shown = ", ".join(names[:MAX_NAMES_IN_ERROR])
    more = f" and {len(names) - MAX_NAMES_IN_ERROR} more" if len(names) > MAX_NAMES_IN_ERROR else ""
    return f"{len(names)} weights hold NaN or infinity: {shown}{more}; give weights of a training that did not diverge"


def _mmdit(size: str) -> nn.Module:
    return MMDiT(SIZES[size])


def _vae(spec: str) -> nn.Module:
    return MelVAE(VAE_SIZES[spec])


def _vocoder(spec: str) -> nn.Module:
    return BigVGAN(VOCODER_SIZES[spec])


def _synchformer() -> nn.Module:
    return Synchformer(SYNCHFORMER)


def _clip() -> nn.Module:
    # Here, because open_clip takes seconds to import.
    from models.clip import CLIP_VIT_H_14, FrozenCLIP

    return FrozenCLIP(CLIP_VIT_H_14)


def _visual_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}


def _network(size: str, md5: str) -> PublicModel:
    return PublicModel(
        role="network",
        variant=size,
        file_name=f"mmaudio_{size}.pth",
        md5=md5,
        licence=NON_COMMERCIAL,
        build=partial(_mmdit, size),
        rename=without_legacy_mmdit_keys,
    )


def _codec(spec: str, file_name: str, md5: str) -> PublicModel:
    return PublicModel(
        role="vae",
        variant=spec,
        file_name=file_name,
        md5=md5,
        licence=NON_COMMERCIAL,
        build=partial(_vae, spec),
        rename=dict,
    )


def _bigvgan(spec: str, file_name: str, md5: str | None, licence: str) -> PublicModel:
    return PublicModel(
        role="vocoder",
        variant=spec,
        file_name=file_name,
        md5=md5,
        licence=licence,
        build=partial(_vocoder, spec),
        rename=fold_weight_norm,
        entry="generator",
    )


PUBLIC_MODELS: tuple[PublicModel, ...] = (
    _network("small_16k", "af93cde404179f58e3919ac085b8033b"),
    _network("small_44k", "babd74c884783d13701ea2820a5f5b6d"),
    _network("medium_44k", "5a56b6665e45a1e65ada534defa903d0"),
    _network("large_44k", "fed96c325a6785b85ce75ae1aafd2673"),
    _network("large_44k_v2", "01ad4464f049b2d7efdaa4c1a59b8dfe"),
    _codec("16k", "v1-16.pth", "69f56803f59a549a1a507c93859fd4d7"),
    _codec("44k", "v1-44.pth", "fab020275fa44c6589820ce025191600"),
    _bigvgan(
        "16k",
        "best_netG.pt",
        "eeaf372a38a9c31c362120aba2dde292",
        "not on record here; from Make-An-Audio 2: ask its authors",
    ),
    _bigvgan("44k", "bigvgan_v2_44khz_128band_512x", None, "MIT (NVIDIA)"),
    PublicModel(
        role="synchformer",
        variant=ANY_SIZE,
        file_name="synchformer_state_dict.pth",
        md5="5b2f5594b0730f70e41e549b7c94390c",
        licence="MIT (Synchformer)",
        build=_synchformer,
        rename=_visual_part,
    ),
    PublicModel(
        role="clip",
        variant=ANY_SIZE,
        file_name="open_clip_pytorch_model.bin of apple/DFN5B-CLIP-ViT-H-14-384",
        md5=None,
        licence="Apple's own: see the model card of apple/DFN5B-CLIP-ViT-H-14-384",
        build=_clip,
        rename=dict,
    ),
)


def find_model(models: Sequence[PublicModel], role: str, size: str) -> PublicModel:
    """The published network that a policy of a named size wants in a role.

    Raises:
        InputError: there is none.
    """
    variants = {"network": size, "vae": SPEC_OF_SIZE.get(size), "vocoder": SPEC_OF_SIZE.get(size)}
    for model in models:
        if model.role == role and model.variant == variants.get(role, ANY_SIZE):
            return model
    sizes = ", ".join(model.variant for model in models if model.role == "network")
    raise InputError(f"--size {size}: no {role} is published for it; sizes with public weights are {sizes}")


def check_identity(
    wanted: PublicModel, found: FileIdentity, models: Sequence[PublicModel], *, trust_unknown: bool
) -> bool:
    """Whether the file is known to be the published one.

    Where no md5 of it is on record (the 44.1 kHz vocoder, CLIP) that cannot be known, and names, shapes and numbers
    have to do.

    Raises:
        InputError: it is another published file, or not the one on record and not trusted.
    """
    if found.md5 == wanted.md5:
        return True
    option = f"--{wanted.role} {found.path}"
    for other in models:
        if found.md5 == other.md5:
            raise InputError(f"{option} is {other.title}, wanted is {wanted.title}")
    if trust_unknown or wanted.md5 is None:
        return False
    raise InputError(
        f"{option} has md5 {found.md5}, the published {wanted.file_name} has {wanted.md5}; download it again, or if it "
        "is a fine-tune add --trust-unknown-checksum"
    )


def refuse_other_size(
    wanted: PublicModel, state: dict[str, Tensor], source: str, models: Sequence[PublicModel]
) -> None:
    """Say so where weights that do not fit are those of another published network.

    Raises:
        InputError: they are.
    """
    for other in models:
        if other is not wanted and other.fits(state):
            raise InputError(f"--{wanted.role} {source} holds weights of {other.title}, wanted is {wanted.title}")
