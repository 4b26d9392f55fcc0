"""What a `COMPLETE` says of files, for tests that write checkpoints of their own."""

from typing import Any

from pipelines.data.storage import Location, open_folder


def digest_files(folder: Location, names: list[str]) -> dict[str, dict[str, Any]]:
    """{name: {size_bytes, sha256}} of files inside `folder`."""
    place = open_folder(folder)
    return {name: {"size_bytes": place.size_bytes(name), "sha256": place.sha256(name)} for name in names}
