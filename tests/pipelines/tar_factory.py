"""Small tars for tests, of well-behaved and of hostile members."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    """A tar of plain files; pairs may repeat a name."""
    pairs = members.items() if isinstance(members, Mapping) else members
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in pairs:
            add_member(tar, name, content)
    return path


def add_member(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    """Add one member; `fields` are attributes of its TarInfo."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))
