"""Published MMAudio files -> a policy M_0, and beside it the networks that give it features and sound."""

from dataclasses import dataclass
from typing import Literal

from jobs import cli


@dataclass(frozen=True, kw_only=True)
class Options:
    """Turn downloaded public checkpoints into one artifact, after checking every name, shape and number in them.

    A file is a local path, or hf://OWNER/REPOSITORY/FILE as it lies in the Hugging Face cache. Nothing is downloaded,
    and nothing that is in a file is run.
    """

    network: cli.StoragePath
    """MM-DiT: mmaudio_<size>.pth, or a fine-tune of it as a state dict or safetensors."""
    out: cli.StoragePath
    """Folder of the policy, on a mounted file system."""
    size: Literal["small_16k", "small_44k", "medium_44k", "large_44k", "large_44k_v2"]
    """Which of the public networks it is; a preset of that name says it as well."""
    vae: cli.StoragePath | None = None
    """Mel autoencoder: v1-16.pth for small_16k, v1-44.pth for the others."""
    vocoder: cli.StoragePath | None = None
    """BigVGAN: best_netG.pt for small_16k, NVIDIA's bigvgan_v2_44khz_128band_512x for the others."""
    synchformer: cli.StoragePath | None = None
    """Synchformer: synchformer_state_dict.pth, of which the visual encoder is kept."""
    clip: cli.StoragePath | None = None
    """CLIP: the open_clip weights of apple/DFN5B-CLIP-ViT-H-14-384, image and text towers."""
    trust_unknown_checksum: bool = False
    """Import files whose md5 is not the one on record. They are checked in every other way all the same."""


def main(options: Options) -> int:
    """Run the stage."""
    from pipelines.imports import import_mmaudio

    files = {
        "network": options.network,
        "vae": options.vae,
        "vocoder": options.vocoder,
        "synchformer": options.synchformer,
        "clip": options.clip,
    }
    import_mmaudio(
        files={role: path for role, path in files.items() if path is not None},
        size=options.size,
        out=options.out,
        trust_unknown_checksum=options.trust_unknown_checksum,
        options_yaml=cli.to_yaml("import_mmaudio", options),
    )
    return 0


if __name__ == "__main__":
    cli.run("import_mmaudio", Options, main)
