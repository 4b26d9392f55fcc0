"""The one door to what is to be processed: a manifest, a foreign list with its folder, a folder, or tars."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.corpus_lists import LIST_FORMATS, read_list, sniff
from pipelines.data.entries import Entries
from pipelines.data.exclusions import exclude
from pipelines.data.listed_videos import locate
from pipelines.data.manifest import read_parquet_manifest, read_text_manifest
from pipelines.data.media_folder import list_videos
from pipelines.data.names import suffix_of
from pipelines.data.text_rows import local_copy, open_text
from pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where clips are named and where they lie."""

    manifest: str | None = None
    """Our own manifest, or a list of a public corpus (then with `videos`)."""
    videos: str | None = None
    """Folder of media files or of WebDataset tars, or one tar."""
    follow: bool = False
    """Take links that leave the folder of the videos."""
    default_split: str = "train"
    """Of what says no split."""
    exclude_ids: Sequence[str] = ()
    """Lists whose clips are taken out of every split."""
    vggss: str | None = None
    """List of VGG-SS, taken out of the split `test`."""
    audio_only: bool = False
    """Take files of sound alone too."""


def gather_entries(sources: Sources) -> Entries:
    """Everything that `sources` name, less what they exclude.

    Raises:
        InputError: something is not there, cannot be parsed (with its line), is empty, or does not go together.
        EnvironmentFailed: storage fails after retries.
    """
    if sources.manifest is not None:
        entries = read_entries(
            sources.manifest,
            videos=sources.videos,
            default_split=sources.default_split,
            follow=sources.follow,
            audio_only=sources.audio_only,
        )
    elif sources.videos is not None:
        entries = list_videos(
            sources.videos,
            follow=sources.follow,
            default_split=sources.default_split,
            audio_only=sources.audio_only,
        )
    else:
        raise InputError("nothing to process; give --manifest, --videos, or both")
    is_vggsound = any(known.is_vggsound for known in LIST_FORMATS if known.name == entries.kind)
    return exclude(entries, exclude_ids=sources.exclude_ids, vggss=sources.vggss, is_vggsound=is_vggsound)


def read_entries(
    location: str,
    *,
    videos: str | None = None,
    default_split: str = "train",
    follow: bool = False,
    audio_only: bool = False,
) -> Entries:
    """Read one of our manifests (csv, tsv, Parquet), or a public corpus's list whose files lie under `videos`.

    Args:
        location: path or URI of the manifest or list; its format is told from its content.
        videos: path or URI of the folder of a list's files; our own manifest says itself where they lie.
        default_split: of rows that say none.
        follow: take links that leave `videos`.
        audio_only: take files of sound alone under `videos` too.

    Raises:
        InputError: it is not there, cannot be parsed (with the line), is empty, or lacks `videos`.
    """
    with local_copy(location, "manifest") as path:
        if suffix_of(location) == ".parquet":
            _refuse_videos(location, videos)
            return read_parquet_manifest(path, location, base=_folder_of(location), default_split=default_split)
        kind, delimiter = sniff(path, location)
        if kind is not None:
            if videos is None:
                raise InputError(
                    f"{location} is a {kind.name} (no column 'video'); say with --videos where its files lie"
                )
            clips = read_list(path, location, kind)
            return locate(
                clips,
                kind,
                location,
                videos=videos,
                default_split=default_split,
                follow=follow,
                audio_only=audio_only,
            )
        _refuse_videos(location, videos)
        with open_text(path, location) as file:
            return read_text_manifest(file, location, delimiter, base=_folder_of(location), default_split=default_split)


def _refuse_videos(location: str, videos: str | None) -> None:
    if videos is not None:
        raise InputError(f"{location} has a column 'video', relative to itself; leave --videos {videos} out")


def _folder_of(location: str) -> str:
    """The folder that a manifest's relative paths start from."""
    if "://" not in location:
        return str(Path(location).absolute().parent)
    return location.rpartition("/")[0]
