"""Rows of csv, tsv and Parquet files from outside, each with its line; streamed, whatever the file's size."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from pipelines.data.names import escape
from pipelines.data.source import SourceReader
from pipelines.errors import InputError, MediaError

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def local_copy(location: str, what: str) -> Iterator[Path]:
    """A regular local file with the content of a path or URI, for as long as the block lasts.

    Raises:
        InputError: it is not there or not a file.
        EnvironmentFailed: storage fails after retries.
    """
    with ExitStack() as opened:
        try:
            media = opened.enter_context(
                SourceReader().open(location if "://" in location else str(Path(location).absolute()))
            )
        except MediaError as error:
            raise InputError(f"{what} {location} does not exist or is not a file ({error.detail})") from error
        yield media.path


def open_text(path: Path, location: str) -> TextIO:
    """A text file as UTF-8; other bytes, which file names may hold, survive as surrogates.

    Raises:
        InputError: it is UTF-16.
    """
    with path.open("rb") as file:
        if file.read(2) in _UTF16_MARKS:
            raise InputError(f"{location} is UTF-16; save it as UTF-8")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def text_rows(
    lines: Iterable[str], location: str, delimiter: str, *, line: int = 1, padded: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of every row that is not blank; quoted fields may hold line ends.

    Args:
        lines: the text, with its line ends.
        location: what to call the file.
        delimiter: between fields.
        line: 1-based number of the first of the lines.
        padded: blanks after a delimiter do not count.

    Raises:
        InputError: quotes that do not close, a field of more than 128 KiB.
    """
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=padded)
    while True:
        at = line + reader.line_num
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{location}, line {at}: {error}") from error
        if fields is None:
            return
        if fields:
            yield at, fields


def parquet_rows(path: Path, location: str, wanted: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based row, values by name) of a Parquet file's `wanted` columns, as far as it has them.

    Raises:
        InputError: it is not a Parquet file, or has no column `video`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            check_header(file.schema_arrow.names, location)
            names = [name for name in file.schema_arrow.names if name in wanted]
            row = 0
            for batch in file.iter_batches(columns=names):
                for values in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                    row += 1
                    yield row, dict(zip(names, values, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{location} is not a Parquet file: {str(error).splitlines()[0]}") from error


def check_header(names: Sequence[str], location: str) -> None:
    """Refuse a header without `video`, or that names a column twice.

    Raises:
        InputError: it is one.
    """
    if "video" not in names:
        shown = ", ".join(escape(name)[:30] for name in names[:8])
        raise InputError(f"{location}, line 1: no column 'video' among: {shown}")
    if len(set(names)) != len(names):
        raise InputError(f"{location}, line 1: a column name occurs twice")
