"""Checkpoint files from outside: which file it is, and its tensors without running anything that is in it.

Nothing here believes a file: it may be missing, cut short, a web page saved under another name, or a pickle that would
run a program when it is opened. torch's weights-only unpickler knows tensors and plain containers and calls nothing
else, so such a pickle ends in an error before its first call.
"""

import hashlib
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from models.weights import load_weights
from pipelines.errors import InputError

CHUNK_BYTES = 1 << 24
HUB = "hf://"
MAX_REASON_CHARS = 120
_FORBIDDEN = re.compile(r"GLOBAL (\S+)")
"""How torch's weights-only unpickler names what a pickle asked for and does not get."""


@dataclass(frozen=True, kw_only=True)
class FileIdentity:
    """Which file it is, whatever it is called."""

    path: Path
    bytes: int
    md5: str
    sha256: str


def local_file(role: str, location: str) -> Path:
    """The file of a role: a local path, or hf://OWNER/REPOSITORY/FILE as it lies in the Hugging Face cache.

    Nothing is downloaded.

    Raises:
        InputError: another URI, or the file is not in the cache.
    """
    if not location.startswith(HUB):
        if "://" in location:
            raise InputError(f"--{role} {location} is no local file; copy it to a disk of this machine first")
        return Path(location)
    owner, _, rest = location.removeprefix(HUB).partition("/")
    repository, _, name = rest.partition("/")
    if not (owner and repository and name):
        raise InputError(f"--{role} {location}: give {HUB}OWNER/REPOSITORY/FILE")
    cached = try_to_load_from_cache(f"{owner}/{repository}", name)
    if not isinstance(cached, str):
        raise InputError(
            f"--{role} {location} is not in the hub's cache on this machine (HF_HUB_CACHE moves it), and nothing is "
            f"downloaded unasked; say: hf download {owner}/{repository} {name}"
        )
    return Path(cached)


def identify(path: Path) -> FileIdentity:
    """Size and checksums, read in pieces.

    Raises:
        InputError: there is no such file, it is a folder, empty or unreadable.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the checkpoint file itself")
    if not path.is_file():
        raise InputError(f"there is no file {path}; give the path of a downloaded checkpoint (nothing is downloaded)")
    # md5 only says which published file it is, since that is what its authors give; lineage goes by sha256.
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    size_bytes = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                md5.update(chunk)
                sha256.update(chunk)
                size_bytes += len(chunk)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not size_bytes:
        raise InputError(f"{path} is empty; download it again")
    return FileIdentity(path=path, bytes=size_bytes, md5=md5.hexdigest(), sha256=sha256.hexdigest())


def read_state_dict(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """The dense CPU tensors of a `.safetensors` file or of a torch file, which is mapped and not read where it can be.

    Args:
        path: the file.
        entry: where a torch file holds several things under names, the one that is wanted; a file that has no such
            name is taken as the state dict itself.

    Raises:
        InputError: cut short, not a checkpoint, or it holds other things than tensors.
    """
    content = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    if isinstance(content, dict) and entry is not None and isinstance(content.get(entry), dict):
        content = content[entry]
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} and no state dict; give the published weights")
    foreign = [str(name) for name, value in content.items() if not (isinstance(name, str) and _is_plain(value))]
    if foreign or not content:
        found = f"what is no plain tensor ({_few(foreign)})" if foreign else "nothing"
        raise InputError(f"{path} holds {found}; give the published weights, not a training checkpoint")
    return {name: tensor.detach() for name, tensor in content.items()}


def _few(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
    )


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_weights(path)
    except ValueError as error:
        raise InputError(str(error)) from error


def _torch_file(path: Path) -> Any:
    """Whatever a torch file holds; files older than torch 1.6 are no zip archives and cannot be mapped."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # Any exception: bytes that nobody vouches for make an unpickler fail in every way there is.
        forbidden = _FORBIDDEN.search(str(error))
        if forbidden:
            raise InputError(
                f"{path} is refused: opening it would call {forbidden[1]}, so it holds more than tensors; nothing "
                "in it was run; give a file of tensors alone, from its publisher"
            ) from error
        raise InputError(f"{path} is not a whole torch checkpoint ({_reason(error)}); download it again") from error


def _reason(error: Exception) -> str:
    """The telling line of torch's long message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("Unsupported")] or lines or [type(error).__name__]
    return telling[0].split(". ")[0].rstrip(".")[:MAX_REASON_CHARS]
