"""Every option of every job says what it is, every preset parses, and --help answers without the heavy imports."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import subprocess
import sys
import textwrap

import pytest
import yaml

from jobs import cli
from tests.policy.sources import ROOT, jobs

HEAVY = (
    "torch",
    "ray",
    "mlflow",
    "deepspeed",
    "pyarrow",
    "av",
    "pandas",
    "scipy",
    "matplotlib",
    "torchaudio",
    "torchvision",
)
PRESETS = sorted((ROOT / "jobs" / "presets").glob("*.yaml"))
SECTIONS = [(preset, job) for preset in PRESETS for job in (yaml.safe_load(preset.read_text()) or {})]
CHOICES = {"preprocess": ["--manifest", "x"], "evaluate": ["--policy", "x"], "curate": ["--out", "x"]}
"""What a job wants of the user although no single option is required: one of several."""


def options_of(job):
    return importlib.import_module(f"jobs.{job}").Options


def documented_fields(options_type):
    """Fields of a dataclass that are followed by a docstring of their own."""
    body = ast.parse(textwrap.dedent(inspect.getsource(options_type))).body[0].body
    return {
        field.target.id
        for field, after in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
        and after.value.value.strip()
    }


@pytest.mark.parametrize("job", jobs())
def test_options_are_frozen_keyword_only_and_documented(job):
    options = options_of(job)
    assert dataclasses.is_dataclass(options)
    assert options.__dataclass_params__.frozen
    assert options.__doc__
    assert not options.__doc__.startswith("Options(")
    fields = {f.name: f for f in dataclasses.fields(options)}
    assert all(f.kw_only for f in fields.values())
    documented = set()
    for kind in options.__mro__[:-1]:
        documented |= documented_fields(kind)
    assert not set(fields) - documented, f"jobs/{job}.py: no docstring under {sorted(set(fields) - documented)}"


def test_there_are_presets():
    assert SECTIONS


def required_flags(job, given):
    """Flags for the options without a default that a preset leaves to the user, with values of their type."""
    flags = []
    for field in dataclasses.fields(options_of(job)):
        flag = f"--{field.name.replace('_', '-')}"
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and not any(word.split("=")[0] == flag for word in given):
            flags += [flag, "x"]
    return flags


@pytest.mark.parametrize(("preset", "job"), SECTIONS, ids=[f"{p.stem}-{j}" for p, j in SECTIONS])
def test_every_section_of_a_preset_names_a_job_and_parses(preset, job):
    assert job in jobs(), f"{preset.name} has a section '{job}' and there is no jobs/{job}.py"
    given = cli.preset_flags(preset.stem, job)
    words = [*given, *required_flags(job, given)]
    cli.parse(job, options_of(job), [*words, *CHOICES.get(job, [])])


@pytest.mark.parametrize("job", jobs())
def test_help_answers_without_heavy_imports(job):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['jobs/{job}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path('jobs/{job}.py', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    assert "--help" in done.stdout


@pytest.mark.parametrize("job", jobs())
def test_a_wrong_option_is_one_line_and_exit_code_2(job):
    command = [sys.executable, f"jobs/{job}.py", "--no-such-option", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"{job}: ")
