"""Contrastive training of SF-CAVP on stored frames and sound, and the calibrated reward that comes out of it.

Frames and sound are decoded in the reader's thread, straight from the row. The start, a model with fitted mel
statistics, is a file; what is exported is a `Reward`: the weights and their calibration on held-out real pairs.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

import pyarrow as pa
import torch
import torchaudio.functional
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from models.codec import Codec, build_codec
from models.pretrained import codec_roles
from models.reward import Reward
from models.sf_cavp import SAMPLE_RATE_HZ, SF_CAVP_SIZES, SFCAVP, parameter_groups
from models.sf_cavp_losses import sf_cavp_loss
from models.sf_cavp_views import LOSS_CONFIGS, Degraded, LossConfig, draw_uniforms
from models.spec import SPECS
from models.weights import load_strict, load_weights, save_weights
from pipelines.data.contracts import DEGRADED, FEATURES
from pipelines.data.media_write import decode_flac
from pipelines.data.store import CHECKPOINT, Dataset, local_folder
from pipelines.data.tables import column_to_numpy
from pipelines.errors import ContractError, InputError
from pipelines.evaluation.gates import measure
from pipelines.evaluation.real_pairs import real_pairs
from pipelines.frozen import networks_folder
from pipelines.training.batches import RowGroups
from pipelines.training.objective import Batch, Data, DataMix, DataRef, Draws, Exported, Gather, Trainee
from pipelines.training.order import GlobalOrder

START_FILE = "start.safetensors"
GATES_FILE = "gates.json"
MAX_FIT_CLIPS = 64
"""Clips that the fixed statistics are fitted on: each bin and channel sees thousands of their values."""


def decode_pictures(jpegs: list[bytes]) -> Tensor:
    """Decode a row's frames, uint8 [T, 3, H, W].

    The same pixels as `pipelines.data.frames` gives, three times as fast: this runs for every sample of every step.
    """
    encoded = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    try:
        return torch.stack(cast(list[Tensor], decode_jpeg(encoded, mode=ImageReadMode.RGB)))
    except RuntimeError as error:
        raise ContractError(f"a row's frames are no JPEG files of one size: {error}") from error


def decode_wave(flac: bytes, rate_hz: int) -> Tensor:
    """Decode a row's sound, float32 [S] at SF-CAVP's 16 kHz."""
    wave = torch.from_numpy(decode_flac(flac))
    if rate_hz == SAMPLE_RATE_HZ:
        return wave
    return torchaudio.functional.resample(wave, rate_hz, SAMPLE_RATE_HZ)


@lru_cache(maxsize=1)
def _codec(spec_name: str, weights: str | None) -> Codec:
    return build_codec(spec_name, "cpu", networks_folder(weights, codec_roles(SPECS[spec_name], decoding=True)))


class SFCAVPTrainee(Trainee):
    """SF-CAVP with its losses."""

    def __init__(self, model: SFCAVP, config: LossConfig) -> None:
        super().__init__()
        self.model = model
        self._config = config

    def forward(self, batch: Batch, gather: Gather) -> tuple[Tensor, dict[str, Tensor]]:
        """Semantic, temporal and edit losses over the whole global micro batch."""
        # Pooled before it is divided, on a quarter of the pixels at the tiny size.
        frames = self.model.pool_frames(batch["frames"].float()) / 255
        degraded = None
        if "degraded" in batch:
            degraded = Degraded(waves=batch["degraded"], is_there=batch["is_degraded"])
        return sf_cavp_loss(self.model, frames, batch["waves"], batch["uniforms"], gather, self._config, degraded)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """No decay on norms, biases and the learned scales."""
        return parameter_groups(self.model, weight_decay)


@dataclass(frozen=True, kw_only=True)
class SFCAVPObjective:
    """Train the SF-CAVP at `start`; calibrate and measure it on `val_split`."""

    start: str
    features: str
    size: str
    sample_rate_hz: int
    """Of the stored sound."""
    spec_name: str = "tiny"
    """Clip spec of the rows, which names their codec."""
    codec_share: float = 0.0
    """Share of the samples whose sound goes through the codec. Everything a generator makes has, so a reward that has
    only met recorded sound hears the codec first and the event second."""
    weights: str | None = None
    """Folder of the codec's networks, where it has some."""
    degraded: str | None = None
    """Dataset of sounds that a policy made worse; None: all that is wrong comes from edits."""
    degraded_every: int = 4
    """One sample in so many is one of those."""
    train_split: str = "train"
    val_split: str = "val"

    name = "sf_cavp"
    probe_every = 0
    loss_is_mean = False
    """Every sample is contrasted with all others of the global micro batch."""
    stop_on_alarm = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Frames and sound, latents where some of the sound is to come out of the codec, and what was made worse."""
        columns = ("frames", "audio", "latent_mean") if self.codec_share > 0 else ("frames", "audio")
        return (*columns, "worse") if self.degraded is not None else columns

    @property
    def training_data(self) -> Data:
        """Rows to train on."""
        real = DataRef(location=self.features, contract=FEATURES.name, split=self.train_split)
        if self.degraded is None:
            return real
        degraded = DataRef(location=self.degraded, contract=DEGRADED.name, split=None)
        return DataMix(members=(real, degraded), weights=(self.degraded_every - 1, 1))

    @property
    def validation_data(self) -> DataRef:
        """Rows to validate on."""
        return DataRef(location=self.features, contract=FEATURES.name, split=self.val_split)

    def build(self, device: torch.device) -> Trainee:
        """Load the starting model."""
        model = SFCAVP(SF_CAVP_SIZES[self.size])
        path = local_folder(self.start, CHECKPOINT) / START_FILE
        load_strict(model, load_weights(path), str(path))
        return SFCAVPTrainee(model.to(device), LOSS_CONFIGS[self.size])

    def collate(self, rows: pa.Table, draws: Draws) -> Batch:
        """Decoded frames uint8 [B, T, 3, H, W], sound [B, S] at 16 kHz, and the uniform numbers of each sample.

        With degraded sounds also which samples have some [B], and those [B', K, S].
        """
        frames = torch.stack([decode_pictures(jpegs) for jpegs in rows["frames"].to_pylist()])
        worse = rows["worse"].to_pylist() if "worse" in rows.column_names else [None] * rows.num_rows
        is_degraded = [versions is not None for versions in worse]
        waves = torch.stack(self._waves(rows, draws, is_degraded))
        config = LOSS_CONFIGS[self.size]
        # Validation is on hard samples throughout.
        positions = draws.positions if draws.stream == "training" else [config.hard_from] * len(draws.positions)
        uniforms = draw_uniforms(draws.generators(), positions, config)
        batch = {"frames": frames, "waves": waves, "uniforms": uniforms}
        if self.degraded is None:
            return batch
        degraded = torch.zeros(0, config.num_edits, waves.shape[1])
        if any(is_degraded):
            degraded = torch.stack([self._versions(versions) for versions in worse if versions is not None])
        return batch | {"degraded": degraded, "is_degraded": torch.tensor(is_degraded)}

    def _versions(self, flacs: list[bytes]) -> Tensor:
        return torch.stack([decode_wave(flac, self.sample_rate_hz) for flac in flacs])

    def _waves(self, rows: pa.Table, draws: Draws, is_degraded: list[bool]) -> list[Tensor]:
        """The rows' sounds [S] at 16 kHz, recorded or, for a share drawn by sample, decoded from their latents.

        The sound of a degraded row has been through the codec already.
        """
        waves = [decode_wave(flac, self.sample_rate_hz) for flac in rows["audio"].to_pylist()]
        if self.codec_share > 0:
            # A stream of draws that this objective has no other use for, so that crops and edits stay as they were.
            lots = Draws(draws.seed, "posterior", draws.positions).generators()
            latents = torch.tensor(column_to_numpy(rows["latent_mean"]))
            for index, lot in enumerate(lots):
                if float(torch.rand((), generator=lot)) < self.codec_share and not is_degraded[index]:
                    decoded = _codec(self.spec_name, self.weights).decode(latents[index : index + 1])[0]
                    resampled = torchaudio.functional.resample(decoded, self.sample_rate_hz, SAMPLE_RATE_HZ)
                    waves[index] = resampled[: len(waves[index])]
        return waves

    def export(self, trainee: Trainee, folder: Path) -> Exported:
        """Calibrate, write the reward, measure the gates that need no policy and write them beside it."""
        if not isinstance(trainee, SFCAVPTrainee):
            raise TypeError(f"expected a SFCAVPTrainee, got {type(trainee).__name__}")
        device = next(trainee.parameters()).device
        dataset = Dataset.open(self.features, FEATURES)

        def pairs() -> Iterator[tuple[Tensor, Tensor, int]]:
            for frames, wave, rate_hz in real_pairs(dataset, self.val_split):
                yield frames.to(device), wave.to(device), rate_hz

        try:
            reward = Reward.calibrated(trainee.model, self.size, pairs())
        except ValueError as error:
            raise InputError(f"{self.features}, split '{self.val_split}': {error}") from error
        files = reward.save(folder)
        report = measure(reward, pairs())
        (folder / GATES_FILE).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
        metrics = {f"gate_{gate.name}": gate.value for gate in report.gates}
        return Exported(sorted([*files, GATES_FILE]), metrics | calibration_metrics(reward))


def calibration_metrics(reward: Reward) -> dict[str, float]:
    """Return the calibration as metrics."""
    return {f"calibration_{name}": float(value) for name, value in asdict(reward.calibration).items()}


def fit_starting_sf_cavp(size: str, seed: int, features: str, split: str, folder: Path) -> None:
    """Write a fresh SF-CAVP with weights from `seed` and statistics fitted on a few clips of a split.

    The clips are the first of a shuffled epoch, so that neighbours in the dataset do not make the statistics.
    """
    dataset = Dataset.open(features, FEATURES)
    groups = RowGroups(DataRef(location=features, contract=FEATURES.name, split=split), ("frames", "audio"))
    rows = groups.take(GlobalOrder(groups.sizes, seed).epoch(0)[:MAX_FIT_CLIPS])
    frames = torch.stack([decode_pictures(jpegs) for jpegs in rows["frames"].to_pylist()])
    waves = [decode_wave(flac, dataset.spec.sample_rate_hz) for flac in rows["audio"].to_pylist()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SFCAVP(SF_CAVP_SIZES[size])
    model.fit(frames.float() / 255, torch.stack(waves))
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / START_FILE, model.state_dict())
