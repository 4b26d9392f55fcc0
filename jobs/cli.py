"""Preset + flags -> a frozen dataclass of options; errors -> one line and an exit code.

A preset is a saved command line: its YAML section of the job is flattened to flags and put in front of the user's, so
one parser gives types, errors and suggestions, and the user's flags win. The resolved options are written beside the
artifact in the same form and can be given back as the preset.
"""

import contextlib
import dataclasses
import io
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
import yaml

from pipelines.errors import InputError, PipelineError

PRESETS = Path(__file__).resolve().parent / "presets"
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the entry point of a submitted job."""


@dataclasses.dataclass(frozen=True)
class _PathMark:
    """Marks an option that names a place, to be made absolute."""


StoragePath = Annotated[str, _PathMark()]
"""A local path or a URI on storage that all nodes see."""

Options = TypeVar("Options")


def run(job: str, options_type: type[Options], main: Callable[[Options], int]) -> typing.NoReturn:
    """Parse `sys.argv`, run `main`, and leave with its exit code; the whole of a job's `__main__`."""
    try:
        sys.exit(main(parse(job, options_type, sys.argv[1:])))
    except PipelineError as error:
        sys.stderr.write(f"{job}: {_one_line(str(error))}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write(f"{job}: interrupted; the same command continues\n")
        sys.exit(130)
    except Exception as error:
        sys.exit(_failed(job, error))


def _failed(job: str, error: Exception) -> int:
    """Exit code of what nobody foresaw: a full disk is the machine's failure wherever it shows, else a defect."""
    if isinstance(error, OSError):
        # Here, because `--help` and wrong options need none of it.
        from pipelines.data.storage_faults import is_machines_fault, local_failure

        if is_machines_fault(error):
            failure = local_failure(error, error.filename or "a file")
            sys.stderr.write(f"{job}: {_one_line(str(failure))}\n")
            return failure.exit_code
    traceback.print_exception(error)
    return 1


def parse(job: str, options_type: type[Options], argv: Sequence[str]) -> Options:
    """Options from `[PRESET] [flags]`; paths come back absolute.

    Raises:
        InputError: unknown preset, a flag that does not parse, a relative path inside a submitted Ray job.
        SystemExit: after `--help`.
    """
    words = list(argv)
    preset: list[str] = []
    if words and not words[0].startswith("-"):
        preset = preset_flags(words.pop(0), job)
    if any(word in ("-h", "--help") for word in words):
        return _help(job, options_type)
    options = _tyro(job, options_type, [*preset, *words])
    return _absolute(options)


def preset_flags(preset: str, job: str) -> list[str]:
    """The flags that a preset holds for a job.

    Raises:
        InputError: no such preset, not YAML, no section for the job.
    """
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise InputError(f"no preset '{preset}': give one of {known}, or the path of a YAML file")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get(job), dict):
        raise InputError(f"{path} has no section '{job}'")
    return flatten(content[job])


def flatten(section: dict[str, Any]) -> list[str]:
    """YAML mapping -> flags: `{a_b: 1, c: true, d: [x, y], e: null}` -> `--a-b=1 --c --d x y --e=None`."""
    flags: list[str] = []
    for name, value in section.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags.append(f"--{flag}={value}")
    return flags


def to_yaml(job: str, options: Any) -> str:
    """The options as a preset file with one section; parses back equal."""
    section = {f.name: _plain(getattr(options, f.name)) for f in dataclasses.fields(options)}
    return yaml.safe_dump({job: section}, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _help(job: str, options_type: type[Options]) -> typing.NoReturn:
    presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
    description = (
        f"{(options_type.__doc__ or '').strip()}\n\nThe first word may be a preset: {presets}, or a YAML path."
    )
    tyro.cli(options_type, args=["--help"], prog=f"python jobs/{job}.py [PRESET]", description=description)
    sys.exit(0)


def _tyro(job: str, options_type: type[Options], args: list[str]) -> Options:
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return tyro.cli(options_type, args=args, prog=f"python jobs/{job}.py")
    except SystemExit as stop:
        if stop.code in (0, None):
            sys.stdout.write(out.getvalue())
            raise
        raise InputError(_box_to_line(err.getvalue() or out.getvalue())) from None
    except (ValueError, TypeError) as error:
        # An option's own validation in __post_init__.
        raise InputError(str(error)) from error


def _box_to_line(box: str) -> str:
    """Tyro's boxed error as one line, without the frame."""
    lines = [
        line.strip() for line in re.sub(r"[╭╮╰╯│─]+|-{4,}|^[|+]|[|+]$", "\n", box, flags=re.MULTILINE).splitlines()
    ]
    return _one_line("; ".join(line for line in lines if line))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _absolute(options: Options) -> Options:
    hints = typing.get_type_hints(type(options), include_extras=True)
    changes = {}
    for field in dataclasses.fields(options):  # pyright: ignore[reportArgumentType]
        if _is_path(hints[field.name]):
            value = getattr(options, field.name)
            changes[field.name] = (
                tuple(_absolute_path(v, field.name) for v in value)
                if isinstance(value, tuple)
                else None
                if value is None
                else _absolute_path(value, field.name)
            )
    return dataclasses.replace(options, **changes)  # pyright: ignore[reportArgumentType]


def _is_path(hint: Any) -> bool:
    if any(isinstance(extra, _PathMark) for extra in _metadata(hint)):
        return True
    if typing.get_origin(hint) in (tuple, types.UnionType, typing.Union):
        return any(_is_path(argument) for argument in typing.get_args(hint))
    return False


def _metadata(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) is Annotated:
        yield from hint.__metadata__


def _absolute_path(value: str, name: str) -> str:
    if "://" in value:
        return value
    if not Path(value).is_absolute() and os.environ.get(RAY_JOB_VARIABLE):
        raise InputError(
            f"--{name.replace('_', '-')} {value} is relative, and a submitted job runs in a throw-away copy of the "
            f'folder; give it absolute, as --{name.replace("_", "-")} "$PWD/{value}", on storage that all nodes see'
        )
    return os.path.normpath(Path(value).absolute())


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition`; for `__post_init__` checks of options."""
    if not condition:
        raise ValueError(message)


__all__ = ["StoragePath", "flatten", "parse", "preset_flags", "require", "run", "to_yaml"]
