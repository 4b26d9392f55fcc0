"""Is an artifact still what it says? python jobs/verify.py --artifact runs/a/features --rows 20."""

from dataclasses import dataclass

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hash every file that the manifest lists, and make random rows of a features dataset again from their sources."""

    artifact: cli.StoragePath
    """Finished artifact of any kind: features, checkpoint, pairs, scores, report."""
    rows: int = 0
    """Rows to make again (features made by preprocess alone); 0: check the files."""
    seed: int = 0
    """Of the draw of rows."""
    weights: cli.StoragePath | None = None
    """Folder of the frozen networks the rows were made with, where the spec needs some."""

    def __post_init__(self) -> None:
        cli.require(self.rows >= 0, f"--rows must be 0 or more, got {self.rows}")


def main(options: Options) -> int:
    """Print what is wrong; 0 when nothing is, 4 when something is."""
    from pipelines.data.verify import check_files, check_rows, summarise
    from pipelines.errors import EXIT_DONE, EXIT_REFUSED

    problems = check_files(options.artifact)
    for problem in problems:
        print(f"verify: {problem}")
    print(
        f"verify: {options.artifact}: {'every file is the one' if not problems else 'files are not those'} of manifest"
    )
    if not options.rows:
        return EXIT_REFUSED if problems else EXIT_DONE
    checks = check_rows(options.artifact, count=options.rows, seed=options.seed, weights=options.weights)
    for check in checks:
        if check.outcome != "equal":
            print(f"verify: {check.clip_id}: {check.outcome} {check.detail}")
    counts = summarise(checks)
    print("verify: rows made again: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return EXIT_REFUSED if problems or counts["differs"] or counts["gone"] else EXIT_DONE


if __name__ == "__main__":
    cli.run("verify", Options, main)
