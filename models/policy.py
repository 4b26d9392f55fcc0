"""A policy: an MM-DiT together with the latent transform it was trained with, and nothing else a sampler needs.

M_0 and every M_k are policies. The transform is fitted before step 0 on the training split and never changes
afterwards, so that the latents of one round mean the same in the next. On disk: `network.safetensors`,
`transform.safetensors` (sizes with a projection) and `config.json`.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from models.flow_matching import euler_sample, euler_sample_from, interpolate
from models.latent_transform import (
    ChannelTransform,
    LatentTransform,
    StreamingMoments,
    Whitening,
    install_condition_statistics,
)
from models.lora import merged_state_dict
from models.mmdit import SIZES, SPEC_OF_SIZE, MMDiT
from models.spec import SPECS
from models.weights import load_config, load_strict, load_weights, save_config, save_weights

KIND = "mmdit"
NETWORK_FILE = "network.safetensors"
TRANSFORM_FILE = "transform.safetensors"
CONFIG_FILE = "config.json"
POLICY_FILES = (NETWORK_FILE, TRANSFORM_FILE, CONFIG_FILE)
"""What `Policy.load` reads; an imported policy has frozen networks beside them."""


class Policy:
    """Network and latent transform of one named size."""

    def __init__(self, network: MMDiT, transform: LatentTransform, size: str) -> None:
        """Put the parts together; use `create` or `load` instead, unless you have the parts."""
        self.network = network
        self.transform = transform
        self.size = size

    @property
    def spec_name(self) -> str:
        """Name of the clip spec (models/spec.py) that this size works on."""
        return SPEC_OF_SIZE[self.size]

    @classmethod
    def create(cls, size: str, seed: int) -> "Policy":
        """A fresh policy on the CPU with weights from `seed`; its statistics are NaN until `fit_statistics`."""
        network = _empty_network(size, "cpu")
        network.init_weights(torch.Generator().manual_seed(seed))
        return cls(network, empty_transform(size, network), size)

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Fit the latent transform (and, for tiny, the condition statistics) in one pass over the training split.

        Each batch is (latents [B, N, C_stored], clip [B, Lc, ...], sync [B, Ls, ...]); for latents give the codec's
        posterior means. The result depends on the clips and their order, not on how they are batched.
        """
        config = self.network.config
        latents = StreamingMoments(
            SPECS[self.spec_name].latent_dim, with_covariance=isinstance(self.transform, Whitening)
        )
        clip = StreamingMoments(config.clip_dim, with_covariance=False)
        sync = StreamingMoments(config.sync_dim, with_covariance=False)
        for latent_batch, clip_batch, sync_batch in batches:
            latents.update(latent_batch)
            if config.standardise_conditions:
                clip.update(clip_batch)
                sync.update(sync_batch)
        if config.standardise_conditions:
            install_condition_statistics(self.network, clip, sync)
        if isinstance(self.transform, Whitening):
            self.transform.fit(latents)
            self.network.latent_mean.fill_(0)
            self.network.latent_std.fill_(1)
        else:
            self.network.latent_mean.copy_(latents.mean())
            self.network.latent_std.copy_(latents.std())

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> "Policy":
        """Move to a device and optionally cast the network (not the transform, which stays float32); returns self."""
        self.network.to(device=device, dtype=dtype)
        if isinstance(self.transform, Whitening):
            self.transform.to(device)
        return self

    def noise_shape(self, batch: int) -> tuple[int, int, int]:
        """Shape (B, N, C_model) of the noise that `generate` starts from."""
        return batch, self.network.latent_len, self.network.config.latent_dim

    @torch.no_grad()
    def generate(
        self,
        clip_f: Tensor,
        sync_f: Tensor,
        text_f: Tensor,
        noise: Tensor,
        num_steps: int,
        guidance: float,
        negative_text: Tensor | None = None,
    ) -> Tensor:
        """Sample stored latents [B, N, C_stored] float32, from noise N(0, I) of `noise_shape(B)`.

        Features are raw, of any float dtype, for B clips or for ONE clip with B candidates (conditions are then
        computed once). `guidance` <= 1 uses the conditional field alone. `negative_text` [1 or B, Lt, text_dim] takes
        the place of the empty string in the unconditional field. Deterministic: all randomness is in `noise`.
        """
        self._check_noise(noise)
        batch, network, device = noise.shape[0], self.network, self.network.device
        conditions = network.preprocess_conditions(clip_f.to(device), sync_f.to(device), text_f.to(device))
        num_clips = conditions.clip.shape[0]
        if num_clips not in (1, batch):
            raise ValueError(f"features of {num_clips} clips, expected 1 or {batch}, the number of noises")
        empty = conditions
        if guidance > 1:
            empty_clip, empty_sync, empty_text = network.empty_features(1)
            if negative_text is not None:
                empty_text = negative_text.to(device)
                empty_clip = empty_clip.expand(empty_text.shape[0], -1, -1)
                empty_sync = empty_sync.expand(empty_text.shape[0], -1, -1)
            empty = network.preprocess_conditions(empty_clip, empty_sync, empty_text)
        # One negative text for each candidate of one clip: every candidate then has conditions of its own.
        conditions = conditions.expand(max(num_clips, empty.clip.shape[0])) if num_clips == 1 else conditions

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            # All candidates are at the same time, so one a condition says it.
            return network.guided_velocity(x, t[: conditions.clip.shape[0]], conditions, empty, guidance)

        sampled = euler_sample(velocity, noise.to(device, torch.float32), num_steps)
        return self.transform.unnormalize(sampled)

    @torch.no_grad()
    def regenerate(
        self,
        clip_f: Tensor,
        sync_f: Tensor,
        text_f: Tensor,
        latents: Tensor,
        noise: Tensor,
        start: Tensor,
        num_steps: int,
        guidance: float,
        blind: bool = False,
    ) -> Tensor:
        """Noise one clip's stored latents [1, N, C_stored] part of the way and sample back: [B, N, C_stored] float32.

        Version b is put on the path to its `noise` of `noise_shape(B)` at time `start[b]` in [0, 1] (1: as it is, 0:
        all noise, a sample like `generate`'s) and integrated to the end: the earlier it starts, the more it has of this
        policy's own faults and the less of the sound (SDEdit: Meng et al. 2022, arXiv 2108.01073). Features are raw, of
        the one clip; `guidance` as in `generate`. `blind` keeps the conditions from the policy, which then finishes
        what is left of the sound with whatever it finds likely: wrong in what and when, however good it is.
        ValueError for noise of another shape or not one start a noise.
        """
        self._check_noise(noise)
        if start.shape != noise.shape[:1]:
            raise ValueError(f"start has shape {tuple(start.shape)}, expected one of each of {noise.shape[0]} noises")
        network, device, count = self.network, self.network.device, noise.shape[0]
        features = network.empty_features(1) if blind else (clip_f.to(device), sync_f.to(device), text_f.to(device))
        conditions = network.preprocess_conditions(*features).expand(count)
        guidance = 1.0 if blind else guidance
        empty = network.preprocess_conditions(*network.empty_features(1)) if guidance > 1 else conditions
        start = start.to(device, torch.float32)
        target = self.transform.normalize(latents.to(device)).float().expand(count, -1, -1)
        point = interpolate(noise.to(device, torch.float32), target, start)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return network.guided_velocity(x, t, conditions, empty, guidance)

        return self.transform.unnormalize(euler_sample_from(velocity, point, start, num_steps))

    def _check_noise(self, noise: Tensor) -> None:
        expected = self.noise_shape(noise.shape[0])
        if noise.shape != expected:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {expected}")

    def save(self, folder: Path) -> list[str]:
        """Write the policy, adapters merged, into an existing folder; returns the names of the files."""
        files = [NETWORK_FILE, CONFIG_FILE]
        save_weights(folder / NETWORK_FILE, merged_state_dict(self.network))
        if isinstance(self.transform, Whitening):
            save_weights(folder / TRANSFORM_FILE, self.transform.state_dict())
            files.append(TRANSFORM_FILE)
        save_config(folder / CONFIG_FILE, {"kind": KIND, "size": self.size, "spec": self.spec_name})
        return sorted(files)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> "Policy":
        """Read a policy, bit for bit what was saved; ValueError says what is missing or does not fit."""
        size = load_config(folder / CONFIG_FILE, KIND).get("size")
        if not isinstance(size, str) or size not in SIZES:
            raise ValueError(f"{folder / CONFIG_FILE} names the size {size!r}; known sizes: {', '.join(SIZES)}")
        network = _empty_network(size, device)
        load_strict(network, load_weights(folder / NETWORK_FILE), str(folder / NETWORK_FILE))
        transform = empty_transform(size, network)
        if isinstance(transform, Whitening):
            load_strict(transform, load_weights(folder / TRANSFORM_FILE), str(folder / TRANSFORM_FILE))
            transform.to(device)
        return cls(network.eval(), transform, size)


def _empty_network(size: str, device: str | torch.device) -> MMDiT:
    """A network whose weights are not set yet; built on the meta device, so that nothing is initialised twice."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; known sizes: {', '.join(SIZES)}")
    with torch.device("meta"):
        network = MMDiT(SIZES[size])
    network.to_empty(device=device)
    if network.condition_statistics is not None:
        network.condition_statistics.reset()
    return network


def empty_transform(size: str, network: MMDiT) -> LatentTransform:
    """The latent transform of a size, to be fitted or loaded; named sizes have theirs in the network."""
    stored_dim, model_dim = SPECS[SPEC_OF_SIZE[size]].latent_dim, SIZES[size].latent_dim
    return ChannelTransform(network) if stored_dim == model_dim else Whitening(stored_dim, model_dim)
