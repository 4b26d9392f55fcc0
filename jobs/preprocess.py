"""Videos and a manifest -> features: python jobs/preprocess.py tiny --manifest clips.csv --out runs/a/features."""

from dataclasses import dataclass
from typing import Literal

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Decode videos, encode them with frozen encoders, and write one row a clip (or a reject with its reason)."""

    out: cli.StoragePath
    """Folder of the features dataset to make."""
    manifest: cli.StoragePath | None = None
    """csv, tsv or Parquet with `video` and optionally start_s, duration_s, caption, split, events. Or give --videos."""
    videos: cli.StoragePath | None = None
    """Folder whose media files are taken, recursively."""
    follow: bool = False
    """With --videos: follow links that leave the folder."""
    spec: str = "tiny"
    """Shapes of the rows: tiny, 16k or 44k."""
    encoders: str = "grids"
    """Frozen encoders of picture and caption: grids (tiny) or clip_synchformer (16k, 44k)."""
    weights: cli.StoragePath | None = None
    """Folder that import_mmaudio made, with VAE, Synchformer and CLIP; the tiny spec needs none."""
    windows: Literal["first", "all"] = "first"
    """One window from start_s, or all whole windows of a file."""
    hop_s: float | None = None
    """With --windows all: seconds between the starts of windows (default: the clip's length)."""
    num_workers: int = 2
    """Workers of the pool; 0 works in this process without Ray. Changes no byte of the result."""
    gpus_per_worker: float = 0.0
    """GPUs each worker holds for its encoders; 0: they run on the CPU."""
    decode_timeout_s: float = 60.0
    """Wall time of decoding one clip, after which its decoder is killed."""
    max_pixels: int = 4096 * 2304
    """Largest picture that is decoded, width x height."""
    max_reject_rate: float = 0.05
    """Share of rejected clips (missing files not counted) above which the job ends with exit code 4."""

    def __post_init__(self) -> None:
        cli.require((self.manifest is None) != (self.videos is None), "give either --manifest or --videos")
        cli.require(self.hop_s is None or self.hop_s > 0, f"--hop-s must be positive, got {self.hop_s}")
        cli.require(self.hop_s is None or self.windows == "all", "--hop-s needs --windows all")
        cli.require(self.num_workers >= 0, f"--num-workers must be 0 or more, got {self.num_workers}")
        cli.require(self.decode_timeout_s > 0, f"--decode-timeout-s must be positive, got {self.decode_timeout_s}")
        cli.require(self.max_pixels > 0, f"--max-pixels must be positive, got {self.max_pixels}")
        cli.require(0 <= self.max_reject_rate <= 1, f"--max-reject-rate is {self.max_reject_rate}, not in 0 .. 1")
        cli.require(self.gpus_per_worker >= 0, f"--gpus-per-worker must be 0 or more, got {self.gpus_per_worker}")


def main(options: Options) -> int:
    """Make the dataset; 0 when it is there."""
    from pipelines.data.ingest import Sources, gather_entries
    from pipelines.data.preprocess import PreprocessSettings, preprocess
    from pipelines.data.units import Pool

    entries = gather_entries(Sources(manifest=options.manifest, videos=options.videos, follow=options.follow))
    settings = PreprocessSettings(
        spec=options.spec,
        encoders=options.encoders,
        windows=options.windows,
        hop_s=options.hop_s,
        max_pixels=options.max_pixels,
        timeout_s=options.decode_timeout_s,
        weights=options.weights,
    )
    dataset = preprocess(
        entries,
        settings,
        out=options.out,
        pool=Pool(num_workers=options.num_workers, num_gpus=options.gpus_per_worker),
        max_reject_rate=options.max_reject_rate,
        options_yaml=cli.to_yaml("preprocess", options),
    )
    counts = dataset.manifest["counts"]
    print(
        f"preprocess: {counts['in']} clips in, {counts['out']} rows, {counts['rejected']} rejected, "
        f"{counts['repeated']} repeated; digest {dataset.digest}"
    )
    return 0


if __name__ == "__main__":
    cli.run("preprocess", Options, main)
