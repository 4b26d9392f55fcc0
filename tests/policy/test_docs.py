"""What README and docs tell people to type works as typed: options parse, targets exist, tables are current."""

import importlib
import re
import shlex

import pytest

from jobs import cli
from pipelines.data import contract_docs
from pipelines.data.contracts import CONTRACTS
from tests.policy.sources import ROOT, jobs

PAGES = sorted(
    [p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if p.is_file()] + list((ROOT / "docs").rglob("*.md"))
)
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
JOB_COMMAND = re.compile(r"python (?:jobs/(\w+)\.py|-m jobs\.(\w+))(.*)")
PLACEHOLDER = re.compile(r"\.\.\.|…|<[^>]+>|\bX\.py\b")


def code_lines(text):
    """Lines of fenced blocks, continued lines joined, and inline code that starts a job or a make target."""
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", outside)


def job_commands():
    """Every complete job command of the pages as (page, job, words)."""
    for page in PAGES:
        for line in code_lines(page.read_text()):
            command = line.split(" #")[0].split(" && ")[-1].split(" | ")[0]
            found = JOB_COMMAND.search(command)
            if found and "--help" not in command and not PLACEHOLDER.search(command):
                yield pytest.param(found[1] or found[2], found[3], id=f"{page.name}: {command.strip()[:80]}")


def make_targets():
    for page in PAGES:
        for line in code_lines(page.read_text()):
            # A command line, not prose: `make` first, or after `&&` or `;`.
            for found in re.finditer(
                r"(?:^|&& |; )make((?: [A-Z]+=\S+)*)((?: [a-z][a-z-]*)+)(?=\s*$|\s+#|\s*&&|\s*;)", line.strip()
            ):
                for target in found[2].split():
                    yield pytest.param(target, id=f"{page.name}: make {target}")


@pytest.mark.parametrize(("job", "words"), list(job_commands()))
def test_every_command_in_the_docs_is_parsed_by_its_job(job, words, monkeypatch):
    assert job in jobs(), f"there is no jobs/{job}.py"
    monkeypatch.setenv("PWD", "/anywhere")
    given = [re.sub(r"\$PWD|\$\{PWD\}", "/anywhere", word) for word in shlex.split(words)]
    cli.parse(job, importlib.import_module(f"jobs.{job}").Options, given)


@pytest.mark.parametrize("target", list(make_targets()))
def test_every_make_target_in_the_docs_exists(target):
    assert target in TARGETS


def test_the_pages_do_hold_commands():
    assert len(list(job_commands())) >= 5
    assert len(list(make_targets())) >= 3


def test_every_job_stands_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert not [job for job in jobs() if f"jobs/{job}.py" not in text and f"make {job}" not in text]


def test_local_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|src=\"([^\"]+)\"", page.read_text()):
            name = target[0] or target[1]
            if "://" not in name and not name.startswith("mailto:") and not (page.parent / name).exists():
                broken.append(f"{page.name}: {name}")
    assert not broken


def test_the_datasets_page_is_what_the_contracts_say():
    page = (ROOT / "docs" / "datasets.md").read_text()
    assert contract_docs.with_generated(page) == page, "run make docs"


def sections(text):
    """Body by heading of second level."""
    parts = (part.partition("\n") for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:])
    return {heading: body.strip() for heading, _, body in parts}


@pytest.mark.parametrize("folder", sorted(p for p in (ROOT / "docs" / "results").iterdir() if p.is_dir()), ids=str)
def test_a_results_page_shows_the_tables_that_were_made(folder):
    page = sections(folder.with_suffix(".md").read_text())
    made = sections((folder / "tables.md").read_text())
    shown = [heading for heading in made if heading in page]
    assert len(shown) >= 3
    assert not [heading for heading in shown if made[heading] not in page[heading]]


def test_every_target_but_help_and_clean_sets_up_first():
    text = (ROOT / "Makefile").read_text()
    rules = dict(re.findall(r"^([a-z][a-z-]*): ?([^#\n]*)", text, re.MULTILINE))
    reach = {name for name, needs in rules.items() if "$(STAMP)" in needs}
    reach |= {name for name, needs in rules.items() if set(needs.split()) & reach}
    assert set(rules) - reach == {"help", "clean"}


@pytest.mark.parametrize("name", sorted(CONTRACTS))
def test_every_column_is_documented(name):
    for column in CONTRACTS[name].columns:
        assert len(column.doc) > 8, f"{name}.{column.name} says nothing about itself"
