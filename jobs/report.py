"""Score tables and a listening page of several models on the same clips: scores + features -> report."""

from dataclasses import dataclass

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare models: tables with intervals and paired differences, and a page with every sound side by side."""

    scores: tuple[cli.StoragePath, ...]
    """Scores datasets of the same clips; the first is what the others are compared with. One of --subject inverted
    adds the Fréchet distance to the real sounds after the codec, the best that a policy can reach."""
    labels: tuple[str, ...]
    """A name for each of them."""
    features: cli.StoragePath
    """Features dataset that was evaluated: pictures, real sounds, events."""
    out: cli.StoragePath
    """Folder of the report."""
    num_clips: int = 12
    """Clips on the listening page, chosen by a hash of their id."""
    clip_ids: tuple[str, ...] = ()
    """Show these clips first."""
    num_resamples: int = 1000
    """Bootstrap resamples behind each interval."""
    title: str = "Listening page"
    """Title of the page."""

    def __post_init__(self) -> None:
        cli.require(
            len(self.scores) == len(self.labels) > 0,
            f"{len(self.scores)} --scores and {len(self.labels)} --labels; give one label for each",
        )
        cli.require(len(set(self.labels)) == len(self.labels), "--labels: give each scores dataset a name of its own")
        cli.require(self.num_clips >= 0, "--num-clips must not be negative")
        cli.require(self.num_resamples >= 1, "--num-resamples must be at least 1")


def main(options: Options) -> int:
    """Write the report, print its table and where the page is."""
    from pipelines.data.storage import open_folder
    from pipelines.evaluation.report import PAGE, TABLE, ReportSettings, write_report

    settings = ReportSettings(
        labels=options.labels,
        num_clips=options.num_clips,
        clip_ids=options.clip_ids,
        num_resamples=options.num_resamples,
        title=options.title,
    )
    write_report(
        options.features,
        options.scores,
        settings,
        out=options.out,
        options_yaml=cli.to_yaml("report", options),
    )
    folder = open_folder(options.out)
    print(folder.read_bytes(TABLE).decode(), end="")
    print(f"listening page: {folder.uri}/{PAGE}")
    return 0


if __name__ == "__main__":
    cli.run("report", Options, main)
