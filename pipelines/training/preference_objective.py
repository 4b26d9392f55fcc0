"""Preference training of a policy on pairs (DPO-FM), and its equal-steps control `winner_fm`.

Winner and loser, policy and reference all see the same noise, time, conditions and condition drops. The reference is
the policy the round starts from, frozen; it is loaded beside the trainee and never saved with it. Where adapters are
trained, the policy without them IS the reference, and there is no second copy. The control trains on the same winners
with the same order and draws, without loser, preference term or reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pyarrow as pa
import torch
from torch import Tensor, nn

from models.flow_matching import flow_matching_loss, interpolate
from models.lora import without_adapters
from models.mmdit import SIZES, Conditions, MMDiT
from models.policy import Policy
from models.preference import (
    CollapseMonitor,
    PairErrors,
    PreferenceLossConfig,
    dpo_flow_matching_loss,
    loser_gradient_scale,
    quartile_means,
)
from pipelines.data.contracts import PAIRS
from pipelines.training.flow_matching_objective import CONDITIONS, flow_draws, load_for_training, tensor
from pipelines.training.objective import Batch, DataRef, Draws, Exported, Gather, Trainee
from pipelines.training.options import Execution, LoRA

Kind = Literal["dpo", "winner_fm"]


def _twice(conditions: Conditions) -> Conditions:
    """Return the conditions of winner and loser in one batch: [w_1 .. w_B, l_1 .. l_B]."""
    names = [entry.name for entry in fields(conditions)]
    return Conditions(**{name: torch.cat([vars(conditions)[name]] * 2) for name in names})


def _residuals(network: MMDiT, batch: Batch, winner: Tensor, loser: Tensor) -> Tensor:
    """Velocity minus target of winners then losers, [2B, N, C], under shared noise, times and dropped conditions."""
    features = network.replace_with_empty(
        (batch["clip_features"], batch["sync_features"], batch["text_features"]),
        batch["drop_video"],
        batch["drop_text"],
    )
    conditions = _twice(network.preprocess_conditions(*features))
    noise, times, data = batch["noise"].repeat(2, 1, 1), batch["time"].repeat(2), torch.cat([winner, loser])
    velocity = network.predict(interpolate(noise, data, times), times, conditions)
    return velocity.float() - (data - noise)


class PreferenceTrainee(Trainee):
    """A policy's network, its frozen reference, and the DPO-FM loss."""

    def __init__(
        self, policy: Policy, reference: Policy | None, config: PreferenceLossConfig, sdpo_mu: float | None
    ) -> None:
        """`reference`: None where the policy has adapters and is the reference without them."""
        super().__init__()
        self.network = policy.network
        self._policy = (policy,)
        self._reference = (reference,)
        self._config = config
        self._sdpo_mu = sdpo_mu
        self._monitor = CollapseMonitor()
        if reference is not None:
            reference.network.eval().requires_grad_(False)

    @property
    def policy(self) -> Policy:
        """The policy that is trained."""
        return self._policy[0]

    @property
    def reference(self) -> Policy | None:
        """The policy the round started from, where it is a copy of its own."""
        return self._reference[0]

    def forward(self, batch: Batch, gather: Gather) -> tuple[Tensor, dict[str, Tensor]]:
        """DPO-FM loss with the winner's flow-matching term, and every metric of it."""
        errors, scale = self._errors(batch)
        return dpo_flow_matching_loss(errors, self._config, times=batch["time"], loser_scale=scale)

    def _errors(self, batch: Batch) -> tuple[PairErrors, Tensor | None]:
        normalize = self.policy.transform.normalize
        winner, loser = normalize(batch["winner"]), normalize(batch["loser"])
        residuals = _residuals(self.network, batch, winner, loser)
        reference = self._reference_residuals(batch, winner, loser)
        policy_winner, policy_loser = residuals.square().mean(dim=(1, 2)).chunk(2)
        reference_winner, reference_loser = reference.square().mean(dim=(1, 2)).chunk(2)
        scale = None
        if self._sdpo_mu is not None:
            of_winner, of_loser = residuals.detach().chunk(2)
            scale = loser_gradient_scale(of_winner, of_loser, self._sdpo_mu)
        errors = PairErrors(
            policy_winner=policy_winner,
            policy_loser=policy_loser,
            reference_winner=reference_winner,
            reference_loser=reference_loser,
        )
        return errors, scale

    @torch.no_grad()
    def _reference_residuals(self, batch: Batch, winner: Tensor, loser: Tensor) -> Tensor:
        if self.reference is not None:
            return _residuals(self.reference.network, batch, winner, loser)
        with without_adapters(self.network):
            return _residuals(self.network, batch, winner, loser)

    def summarise(self, metrics: dict[str, float]) -> dict[str, float]:
        """Sums by time quartile become means."""
        return quartile_means(metrics)

    def probe(self, batch: Batch, gather: Gather) -> dict[str, float]:
        """Gradient norms of the DPO part and of the weighted flow-matching part, and their cosine.

        Of this rank's first micro batch, before clipping; costs one more forward and two backward passes.
        """
        errors, scale = self._errors(batch)
        dpo_alone = PreferenceLossConfig(**{**vars(self._config), "fm_weight": 0.0})
        dpo, _ = dpo_flow_matching_loss(errors, dpo_alone, loser_scale=scale)
        anchor = self._config.fm_weight * errors.policy_winner.mean()
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        dpo_grads = _gradients(dpo, parameters, retain=True)
        anchor_grads = _gradients(anchor, parameters, retain=False)
        dpo_norm, anchor_norm = _norm(dpo_grads), _norm(anchor_grads)
        inner = sum(float((a * b).sum()) for a, b in zip(dpo_grads, anchor_grads, strict=True))
        return {
            "grad_norm_dpo": dpo_norm,
            "grad_norm_fm": anchor_norm,
            "grad_cosine": inner / max(dpo_norm * anchor_norm, torch.finfo(torch.float32).tiny),
        }

    def alarm(self, metrics: dict[str, float]) -> str | None:
        """Loser-driven collapse, from running averages (guard (b) of the specification)."""
        return self._monitor.update(metrics)

    def watch_state(self) -> dict[str, float]:
        """Return the running averages."""
        return self._monitor.state_dict()

    def load_watch_state(self, state: dict[str, float]) -> None:
        """Continue with them."""
        self._monitor.load_state_dict(state)


class WinnerTrainee(Trainee):
    """The control: flow matching on the winners alone."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.network = policy.network
        self._policy = (policy,)

    @property
    def policy(self) -> Policy:
        """The policy that is trained."""
        return self._policy[0]

    def forward(self, batch: Batch, gather: Gather) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean flow-matching error of the winners."""
        winner = self.policy.transform.normalize(batch["winner"])
        features = self.network.replace_with_empty(
            (batch["clip_features"], batch["sync_features"], batch["text_features"]),
            batch["drop_video"],
            batch["drop_text"],
        )
        velocity = self.network(interpolate(batch["noise"], winner, batch["time"]), *features, batch["time"])
        return flow_matching_loss(velocity, batch["noise"], winner).mean(), {}


@dataclass(frozen=True, kw_only=True)
class PreferenceObjective:
    """Train on from the policy at `start` on the kept pairs."""

    start: str
    pairs: str
    size: str
    kind: Kind = "dpo"
    loss: PreferenceLossConfig
    sdpo_mu: float | None = None
    strict_guards: bool = False
    probe_steps: int = 0
    lora: LoRA | None = None
    """Adapters to train; None: every weight."""
    lora_seed: int = 0
    """Seed of the adapters' start."""
    execution: Execution = field(default_factory=Execution)

    columns = (*CONDITIONS, "winner", "loser")
    validation_data = None
    loss_is_mean = True

    @property
    def name(self) -> str:
        """`dpo` or `winner_fm`."""
        return self.kind

    @property
    def probe_every(self) -> int:
        """Steps between gradient probes; the control has nothing to probe."""
        return self.probe_steps if self.kind == "dpo" else 0

    @property
    def stop_on_alarm(self) -> bool:
        """Under strict guards a collapse alarm ends the training."""
        return self.strict_guards

    @property
    def training_data(self) -> DataRef:
        """The kept pairs."""
        return DataRef(location=self.pairs, contract=PAIRS.name, split=None, keep_column="kept")

    def build(self, device: torch.device) -> Trainee:
        """Load the round's start, and once more as the reference if every weight is trained."""
        policy = load_for_training(self.start, device, self.lora, self.lora_seed, self.execution)
        if self.kind == "winner_fm":
            return WinnerTrainee(policy)
        reference = None
        if self.lora is None:
            reference = load_for_training(self.start, device, None, self.lora_seed, self.execution)
        return PreferenceTrainee(policy, reference, self.loss, self.sdpo_mu)

    def collate(self, rows: pa.Table, draws: Draws) -> Batch:
        """Conditions, both sounds, and the draws of flow matching, one set a pair."""
        names = (*CONDITIONS, "winner", "loser") if self.kind == "dpo" else (*CONDITIONS, "winner")
        batch = {name: tensor(rows, name) for name in names}
        shape = batch["winner"].shape[1], SIZES[self.size].latent_dim
        return batch | flow_draws(draws, shape, drop=draws.stream == "training")

    def export(self, trainee: Trainee, folder: Path) -> Exported:
        """Write the policy."""
        if not isinstance(trainee, PreferenceTrainee | WinnerTrainee):
            raise TypeError(f"expected the trainee of a preference objective, got {type(trainee).__name__}")
        return Exported(trainee.policy.save(folder), {})


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter], *, retain: bool) -> list[Tensor]:
    grads = torch.autograd.grad(loss, parameters, retain_graph=retain, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def _norm(gradients: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(gradients))
