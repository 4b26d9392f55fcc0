"""What the policy tests look at: the project's files as git knows them, and as syntax trees."""

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("models", "pipelines", "jobs")


@cache
def tracked_files() -> tuple[Path, ...]:
    """Every file that is, or would be, committed, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return tuple(sorted(Path(name) for name in listed if name and (ROOT / name).is_file()))


def modules(*layers: str) -> list[Path]:
    """Python files below the given top folders, relative to the root."""
    return [path for path in tracked_files() if path.suffix == ".py" and path.parts[0] in (layers or LAYERS)]


@cache
def tree(path: Path) -> ast.Module:
    """Syntax tree of a module."""
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def imported_names(path: Path) -> set[tuple[str, int]]:
    """Dotted names of everything a module imports, anywhere in it, with the line."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {(f"{node.module}.{alias.name}", node.lineno) for alias in node.names}
    return found


def jobs() -> list[str]:
    """Names of the jobs: the modules of `jobs/` that a person starts."""
    return sorted(
        path.stem
        for path in modules("jobs")
        if path.parent == Path("jobs") and path.stem not in ("__init__", "cli", "chain")
    )
