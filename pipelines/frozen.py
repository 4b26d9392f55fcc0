"""Where the frozen networks of the named sizes are: a folder that `import_mmaudio` made, each file known by its hash.

Features remember which networks made them, so that their latents are never decoded by another codec.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from models.pretrained import FILE_OF_ROLE, codec_roles, how_to_get
from models.spec import ClipSpec
from pipelines.data.storage import open_folder
from pipelines.data.store import CHECKPOINT, Dataset, local_folder, open_local_files, read_manifest
from pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FrozenNetworks:
    """The networks that a stage needs; nothing for presets whose encoders and codec have no weights."""

    location: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Of each network's file, by role."""

    @property
    def folder(self) -> Path | None:
        """The folder for `build_codec` and `build_encoders`, on whatever machine asks."""
        return networks_folder(self.location, tuple(self.sha256))

    @property
    def as_input(self) -> dict[str, str]:
        """What goes into a stage's fingerprint: empty where there is no network."""
        if not self.sha256:
            return {}
        return {
            "weights": hashlib.sha256(
                "\n".join(f"{k} {v}" for k, v in sorted(self.sha256.items())).encode()
            ).hexdigest()
        }


def networks_folder(location: str | None, roles: Sequence[str]) -> Path | None:
    """Where the networks of `roles` lie on this machine, opened and verified before; None for no location."""
    return None if location is None else local_folder(location, CHECKPOINT, only=[FILE_OF_ROLE[r] for r in roles])


def open_frozen(location: str | None, roles: Sequence[str], *, policy: str | None = None) -> FrozenNetworks:
    """Find and verify the networks of `roles`; only their files are hashed.

    Args:
        location: `--weights`, the folder of an import; None: the policy's own.
        roles: what is needed; empty: nothing, whatever the location.
        policy: location of the policy at hand, which has them beside it if it was imported with them.

    Raises:
        InputError: no folder is given, or it lacks one of them.
        ContractError: a file is missing or altered.
    """
    if not roles:
        return FrozenNetworks()
    chosen = location or policy
    wanted = ", ".join(roles)
    if chosen is None:
        raise InputError(
            f"the networks {wanted} are needed: give --weights, the folder that jobs/import_mmaudio.py made"
        )
    listed = {entry["path"]: entry["sha256"] for entry in read_manifest(chosen, kind=CHECKPOINT)["files"]}
    missing = [role for role in roles if FILE_OF_ROLE[role] not in listed]
    if missing:
        raise InputError(f"{chosen} holds no {' and no '.join(missing)}: {how_to_get(missing)}")
    names = [FILE_OF_ROLE[role] for role in roles]
    open_local_files(chosen, CHECKPOINT, only=names)
    return FrozenNetworks(location=open_folder(chosen).uri, sha256={role: listed[FILE_OF_ROLE[role]] for role in roles})


def open_codec(location: str | None, spec: ClipSpec, features: Dataset | None, policy: str | None) -> FrozenNetworks:
    """The networks that turn latents of `spec` into sound; those of `features`, where some are given.

    Raises:
        InputError: as `open_frozen`, or the features' latents come from another VAE.
    """
    found = open_frozen(location, codec_roles(spec, decoding=True), policy=policy)
    made_by = {} if features is None else features.manifest.get("frozen", {})
    if features is not None and found.sha256.get("vae") != made_by.get("vae"):
        raise InputError(
            f"{features.folder.uri} has latents of another VAE (sha256 {str(made_by.get('vae'))[:12]}) than the one "
            f"in {found.location} ({str(found.sha256.get('vae'))[:12]}); give the --weights they were made with"
        )
    return found
