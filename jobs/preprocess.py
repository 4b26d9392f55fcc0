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
    """csv, tsv or Parquet with `video` and optionally start_s, duration_s, caption, split, events; or a list of
    VGGSound, VGG-SS, MMAudio, AudioSet, AudioCaps or bare ids, whose files lie under --videos."""
    videos: cli.StoragePath | None = None
    """Folder of media files (searched recursively) or of WebDataset tars, or one tar; alone, all of it is taken."""
    follow: bool = False
    """With --videos: follow links that leave the folder."""
    audio_only: bool = False
    """Make rows of sound and words alone, without a picture: of wav, flac, mp3, ogg, and of videos, whose picture is
    not looked at. For training the generator; everything else needs pictures."""
    default_split: Literal["train", "rpo", "val", "test"] = "train"
    """Split of clips for which neither manifest nor list says one."""
    exclude_ids: tuple[cli.StoragePath, ...] = ()
    """Lists (of any of the formats) whose clips are taken out of every split."""
    vggss: cli.StoragePath | None = None
    """List of VGG-SS (json or ids), taken out of the test split."""
    spec: str = "tiny"
    """Shapes of the rows: tiny, 16k or 44k."""
    encoders: str = "grids"
    """Frozen encoders of picture and caption: grids (tiny) or clip_synchformer (16k, 44k)."""
    weights: cli.StoragePath | None = None
    """Folder that import_mmaudio made, with VAE, Synchformer and CLIP; the tiny spec needs none."""
    windows: Literal["first", "all", "scenes"] = "first"
    """One window from start_s, all whole windows of a file, or those that no scene cut runs through."""
    hop_s: float | None = None
    """With all and scenes: seconds between the starts of windows (default: the clip's length)."""
    num_workers: int = 2
    """Workers of the pool; 0 works in this process without Ray. Changes no byte of the result."""
    gpus_per_worker: float = 0.0
    """GPUs each worker holds for its encoders; 0: they run on the CPU."""
    decode_timeout_s: float = 60.0
    """Wall time of decoding one clip, after which its decoder is killed."""
    stall_timeout_s: float = 900.0
    """Longest time that a worker may take for one clip in all, after which it is killed and replaced."""
    max_pixels: int = 4096 * 2304
    """Largest picture that is decoded, width x height."""
    max_file_s: float | None = None
    """Length of a file from which it is rejected as too_long; by default any length is taken, in constant memory."""
    max_reject_rate: float = 0.05
    """Share of rejected clips (missing files not counted) above which the job ends with exit code 4."""

    def __post_init__(self) -> None:
        cli.require((self.manifest or self.videos) is not None, "give --manifest, --videos, or both")
        cli.require(self.hop_s is None or self.hop_s > 0, f"--hop-s must be positive, got {self.hop_s}")
        cli.require(self.hop_s is None or self.windows != "first", "--hop-s needs --windows all or scenes")
        cli.require(
            not (self.audio_only and self.windows == "scenes"), "--audio-only sees no scenes: choose first or all"
        )
        cli.require(self.num_workers >= 0, f"--num-workers must be 0 or more, got {self.num_workers}")
        cli.require(self.decode_timeout_s > 0, f"--decode-timeout-s must be positive, got {self.decode_timeout_s}")
        enough_s = 3 * self.decode_timeout_s
        cli.require(self.stall_timeout_s >= enough_s, f"--stall-timeout-s must be at least {enough_s:g}: 3 decodings")
        cli.require(self.max_file_s is None or self.max_file_s > 0, f"--max-file-s is {self.max_file_s}, not above 0")
        cli.require(self.max_pixels > 0, f"--max-pixels must be positive, got {self.max_pixels}")
        cli.require(0 <= self.max_reject_rate <= 1, f"--max-reject-rate is {self.max_reject_rate}, not in 0 .. 1")
        cli.require(self.gpus_per_worker >= 0, f"--gpus-per-worker must be 0 or more, got {self.gpus_per_worker}")


def main(options: Options) -> int:
    """Make the dataset; 0 when it is there."""
    from pipelines.data.ingest import Sources, gather_entries
    from pipelines.data.preprocess import preprocess
    from pipelines.data.preprocess_settings import PreprocessSettings
    from pipelines.data.units import Pool

    entries = gather_entries(
        Sources(
            manifest=options.manifest,
            videos=options.videos,
            follow=options.follow,
            default_split=options.default_split,
            exclude_ids=options.exclude_ids,
            vggss=options.vggss,
            audio_only=options.audio_only,
        )
    )
    for name, count in entries.num_excluded.items():
        print(f"preprocess: {name}_excluded: {'unknown' if count is None else count}")
    if entries.num_missing:
        first = ", ".join(entries.missing_names())
        print(f"preprocess: {entries.num_missing} listed clips are not there ({first} ...); rejects, reason `missing`")
    settings = PreprocessSettings(
        spec=options.spec,
        encoders=options.encoders,
        windows=options.windows,
        hop_s=options.hop_s,
        audio_only=options.audio_only,
        max_pixels=options.max_pixels,
        max_file_s=options.max_file_s,
        timeout_s=options.decode_timeout_s,
        weights=options.weights,
    )
    dataset = preprocess(
        entries,
        settings,
        out=options.out,
        pool=Pool(num_workers=options.num_workers, num_gpus=options.gpus_per_worker, stall_s=options.stall_timeout_s),
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
