"""features + measures + predicates -> features of the clips that meet them, without decoding again.

python jobs/curate.py --features F --measures M --keep "loudness_lufs >= -50" "abs(offset_s) <= 0.2" --out C
"""

from dataclasses import dataclass

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Keep the clips that meet every predicate; the others become rejects that name the one they did not meet."""

    features: cli.StoragePath
    """Features dataset to filter."""
    measures: cli.StoragePath
    """What jobs/measure.py made of it."""
    keep: tuple[str, ...]
    """Predicates, each `COLUMN OP NUMBER` or `abs(COLUMN) OP NUMBER`; OP is < <= > >= == or !=. A measure that is not
    known meets none, unless the predicate ends in `or null`."""
    out: cli.StoragePath | None = None
    """Folder of the features dataset to make; not needed with --dry-run."""
    dry_run: bool = False
    """Print how many clips each predicate drops, alone and after those before it, and write nothing."""
    num_workers: int = 0
    """Workers of the pool; 0, enough until hundreds of GB are copied, works in this process without Ray. Changes no
    byte of the result."""

    def __post_init__(self) -> None:
        cli.require(self.dry_run or self.out is not None, "--out is missing; give a folder, or --dry-run")
        cli.require(bool(self.keep), "--keep is missing: give a predicate, as --keep 'loudness_lufs >= -50'")
        cli.require(self.num_workers >= 0, f"--num-workers must be 0 or more, got {self.num_workers}")


def main(options: Options) -> int:
    """Print what the predicates do; make the dataset unless it is a dry run."""
    from pipelines.curation.curate import curate, plan_curation
    from pipelines.curation.predicates import effects_table
    from pipelines.data.store import read_manifest
    from pipelines.data.units import Pool

    plan = plan_curation(options.features, options.measures, options.keep)
    print(effects_table(plan.verdict), end="")
    if options.dry_run or options.out is None:
        return 0
    curate(
        plan,
        out=options.out,
        pool=Pool(num_workers=options.num_workers),
        options_yaml=cli.to_yaml("curate", options),
    )
    manifest = read_manifest(options.out)
    counts = manifest["counts"]
    print(
        f"curate: {counts['in']} clips in, {counts['out']} kept, {counts['rejected']} filtered; "
        f"digest {manifest['digest']}"
    )
    return 0


if __name__ == "__main__":
    cli.run("curate", Options, main)
