"""Is this machine fit? Versions, disk, Ray's authentication, MLflow: python jobs/doctor.py."""

from dataclasses import dataclass
from pathlib import Path

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Look at this machine and say what is fit and what is not; exit code 3 when something fails."""

    folder: cli.StoragePath | None = None
    """Folder where results would go: its disk and its MLflow store are looked at (default: runs here)."""
    dashboard: str = "http://127.0.0.1:8265"
    """Ray dashboard that is asked, without a token, whether it would run anybody's jobs."""
    ship: cli.StoragePath | None = None
    """Send what MLflow does not have yet of the runs below this folder, after an outage; checks nothing else."""


def main(options: Options) -> int:
    """Print a line a check; 0 when none fails, else 3."""
    from pipelines.errors import EXIT_DONE, EXIT_ENVIRONMENT, EnvironmentFailed, InputError
    from pipelines.health import all_checks
    from pipelines.tracking_shipper import default_store, ship_below

    if options.ship is not None:
        if not Path(options.ship).is_dir():
            raise InputError(f"--ship {options.ship} is not a folder; give one that holds runs, such as runs/demo")
        if not ship_below(Path(options.ship)):
            raise EnvironmentFailed(
                f"not all runs below {options.ship} could be shipped; the journals keep them, run the same again"
            )
        print(f"doctor: everything below {options.ship} is in MLflow")
        return EXIT_DONE
    folder = Path(options.folder) if options.folder is not None else Path.cwd() / "runs"
    verdicts = []
    for check in all_checks(folder=folder, dashboard=options.dashboard, store=default_store(str(folder / "any"))):
        found = check()
        verdicts.append(found.verdict)
        print(found.line(), flush=True)
    failed = verdicts.count("fail")
    print(f"doctor: {failed} of {len(verdicts)} checks failed" if failed else "doctor: fit")
    return EXIT_ENVIRONMENT if failed else EXIT_DONE


if __name__ == "__main__":
    cli.run("doctor", Options, main)
