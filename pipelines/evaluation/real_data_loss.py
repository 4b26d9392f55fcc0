"""The flow-matching error of a policy on real sound: what a preference round must not buy its reward with.

Noise and times of a clip are a function of (seed, clip), so two policies are compared on exactly the same points of the
same paths; the times are the quantiles of the training distribution, which takes their scatter out of the estimate.
"""

import torch
from torch import Tensor

from models.flow_matching import flow_matching_loss, interpolate
from models.policy import Policy
from pipelines.preferences.candidates import ConditionRow
from pipelines.preferences.pairs import stable_seed

NUM_TIMES = 8


@torch.no_grad()
def real_data_loss(policy: Policy, conditions: ConditionRow, latents: Tensor, *, seed: int, clip_id: str) -> float:
    """Mean squared velocity error over `NUM_TIMES` points of one clip's path, with its conditions, none dropped.

    `latents` are stored latents [N, C_stored] of the real sound (the codec's mean). In units of the policy's normalised
    latents, so it compares policies that share a latent transform.
    """
    device = policy.network.device
    data = policy.transform.normalize(latents[None].to(device)).expand(NUM_TIMES, -1, -1)
    generator = torch.Generator().manual_seed(stable_seed(seed, clip_id, "real_data_loss"))
    noise = torch.randn(tuple(data.shape), generator=generator).to(device)
    middles = (torch.arange(NUM_TIMES, dtype=torch.float64) + 0.5) / NUM_TIMES
    # The quantile function of the logit-normal distribution that training draws its times from.
    times = torch.special.ndtri(middles).sigmoid().float().to(device)
    network = policy.network
    prepared = network.preprocess_conditions(*(values.to(device) for values in conditions.tensors()))
    velocity = network.predict(interpolate(noise, data, times), times, prepared.expand(NUM_TIMES))
    return float(flow_matching_loss(velocity, noise, data).mean())
