"""What SF-CAVP learns from: which sound belongs to a picture (slow), when it sounds (fast), and what is wrong with it.

The views of a batch (`models.sf_cavp_views`) give each picture crop a sound with a known offset, which is to be told,
and an aligned one, which must be preferred to worse and worse versions of itself. Losses across samples see the whole
batch through an injected `gather` ([B, ...] on one rank -> [world * B, ...] on all, with a gradient that sums over
ranks), so that any number of ranks computes the same loss.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from models.sf_cavp import SFCAVP, Streams, clip_vector, offset_similarity, temporal_contrast
from models.sf_cavp_views import Degraded, LossConfig, TrainingViews, make_views

Gather = Callable[[Tensor], Tensor]


def semantic_loss(
    video: Tensor, audio: Tensor, edited: Tensor, is_wrong: Tensor, scale: Tensor, num_crops: int
) -> Tensor:
    """Symmetric InfoNCE over unit clip vectors [G, D], the worse versions of the picture's own sound as more columns.

    `edited` [G, K] are cosines of each picture with those versions, left out where not `is_wrong`. Other crops of the
    same video (adjacent rows, `num_crops` a video) are no negatives: steady sound would make them false ones.
    """
    logits = scale * video @ audio.T
    rows = torch.arange(len(logits), device=logits.device)
    same_video = (rows[:, None] // num_crops == rows[None] // num_crops) & (rows[:, None] != rows[None])
    logits = logits.masked_fill(same_video, float("-inf"))
    columns = (scale * edited).masked_fill(~is_wrong, float("-inf"))
    to_audio = F.cross_entropy(torch.cat([logits, columns], dim=1), rows)
    to_video = F.cross_entropy(logits.T, rows)
    return (to_audio + to_video) / 2


def offset_loss(similarity: Tensor, true_offset: Tensor, offsets: Tensor, scale: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of the true offset [B], a value a clip: similarity S(d) [B, n] for ascending offsets [n].

    `smoothing` of the label is shared by the neighbouring bins that exist.
    """
    label = torch.searchsorted(offsets, true_offset)
    neighbours = (torch.arange(len(offsets), device=label.device)[None] - label[:, None]).abs() == 1
    target = smoothing * neighbours / neighbours.sum(dim=1, keepdim=True)
    target = target + (1 - smoothing) * F.one_hot(label, len(offsets))
    return -(target * F.log_softmax(scale * similarity, dim=1)).sum(dim=1)


def segment_loss(video_fast: Tensor, audio_fast: Tensor, scale: Tensor, segment_steps: int) -> Tensor:
    """Diff-Foley-like timing loss on ALIGNED streams [B, T, D], a value a clip.

    Mean vectors of whole segments, cross-entropy among the segments of the same video, in both directions.
    """
    num_segments = min(video_fast.shape[1], audio_fast.shape[1]) // segment_steps
    assert num_segments > 1, f"one segment of {segment_steps} steps has nothing to be told from"

    def segments(fast: Tensor) -> Tensor:
        pooled = rearrange(fast[:, : num_segments * segment_steps], "b (n s) d -> b n s d", n=num_segments)
        return F.normalize(pooled.mean(dim=2), dim=-1)

    logits = scale * torch.einsum("bnd,bmd->bnm", segments(video_fast), segments(audio_fast))
    label = repeat(torch.arange(num_segments, device=logits.device), "n -> b n", b=len(logits))
    to_audio = F.cross_entropy(rearrange(logits, "b n m -> b m n"), label, reduction="none")
    to_video = F.cross_entropy(logits, label, reduction="none")
    return (to_audio + to_video).mean(dim=1) / 2


def ranking_loss(scores: Tensor, is_wrong: Tensor, scale: Tensor) -> Tensor:
    """Negative log-likelihood (Plackett-Luce) of the right order of sounds that get worse and worse, a value a clip.

    `scores` [B, 1 + K]: the real sound, then K versions. Version j counts as worse than i < j if one of the steps
    from i to j made it worse (`is_wrong` [B, K]). The real sound must be the best, and of two wrong
    ones the less wrong must be better: among a generator's candidates none is right.
    """
    num_edits = is_wrong.shape[1]
    edits_so_far = F.pad(is_wrong.cumsum(dim=1), (1, 0))
    total = torch.zeros_like(scores[:, 0])
    for i in range(num_edits):
        is_worse = edits_so_far[:, i + 1 :] > edits_so_far[:, i : i + 1]
        worse = (scale * scores[:, i + 1 :]).masked_fill(~is_worse, float("-inf"))
        own = scale * scores[:, i : i + 1]
        total = total + torch.logsumexp(torch.cat([own, worse], dim=1), dim=1) - own[:, 0]
    return total / num_edits


def group_shares(is_degraded: Tensor, gather: Gather) -> Tensor:
    """Weights [B] that make a mean over all samples the sum of two means: over samples with edits, and over degraded.

    Few samples bring degraded sounds; in one mean with all others these would hardly count.
    """
    every = gather(is_degraded.float())
    num_degraded = every.sum()
    counts = torch.where(is_degraded, num_degraded, len(every) - num_degraded)
    return len(every) / counts


def onset_weights(log_mel: Tensor, gather: Gather) -> Tensor:
    """Weight of each clip's timing [B]: deviation of its onset strength over the batch's median, in [0.2, 2].

    A steady engine carries no timing signal. Onset strength is the mean positive difference of log-mel columns.
    """
    strength = torch.relu(log_mel[:, :, 1:] - log_mel[:, :, :-1]).mean(dim=1).std(dim=1)
    median = gather(strength).median().clamp(min=1e-6)
    return (strength / median).clamp(0.2, 2.0)


def sf_cavp_loss(
    model: SFCAVP,
    frames: Tensor,
    waves: Tensor,
    u: Tensor,
    gather: Gather,
    config: LossConfig,
    degraded: Degraded | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss (scalar) and detached metrics of one rank's samples; shapes as in `make_views`, B even.

    Under autocast the encoders alone run in its dtype: spectrograms and similarities, which are multiplied by up to 100
    before the softmax, need float32.
    """
    with torch.autocast(frames.device.type, enabled=False):
        views = make_views(model, frames, waves, u, config, degraded)
    streams = (model.encode_video(views.frames), *_encode_sounds(model, views))
    with torch.autocast(frames.device.type, enabled=False):
        video, offset_sound, sounds = (Streams(slow.float(), fast.float()) for slow, fast in streams)
        return _losses(model, views, video, offset_sound, sounds, gather, config)


def _losses(
    model: SFCAVP,
    views: TrainingViews,
    video: Streams,
    offset_sound: Streams,
    sounds: Streams,
    gather: Gather,
    config: LossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    scale_slow, scale_fast = model.scales()
    num_sounds = views.sounds.shape[1]
    without_edits = 1 + config.num_edits - num_sounds
    offsets = _offset_grid(config, video.fast.device)

    # [B, 1 + K]: S_sem's pooled half and S_tmp, of the real sound and its versions; nought where there are none, so
    # that every rank gathers the same shapes.
    video_vector = clip_vector(video.slow)
    sound_vectors = rearrange(clip_vector(sounds.slow), "(b k) d -> b k d", k=num_sounds)
    cosines = F.pad(torch.einsum("bd,bkd->bk", video_vector, sound_vectors), (0, without_edits))
    repeated = video.fast.repeat_interleave(num_sounds, dim=0)
    contrasts = temporal_contrast(offset_similarity(repeated, sounds.fast, offsets), offsets)
    contrasts = F.pad(rearrange(contrasts, "(b k) -> b k", k=num_sounds), (0, without_edits))

    all_video, all_audio = gather(video_vector), gather(sound_vectors[:, 0])
    edited, is_edited = gather(cosines[:, 1:]), gather(views.is_wrong.cumsum(dim=1) > 0)
    semantic = semantic_loss(all_video, all_audio, edited, is_edited, scale_slow, config.num_crops)
    similarity = offset_similarity(video.fast, offset_sound.fast, offsets)
    if config.temporal_form == "offset":
        timing = offset_loss(similarity, views.offset, offsets, scale_fast, config.label_smoothing)
    else:
        real_fast = sounds.fast[::num_sounds]
        timing = segment_loss(video.fast, real_fast, scale_fast, config.segment_steps)
    temporal = (onset_weights(views.sounds[:, 0], gather) * timing).mean()
    shares = group_shares(views.is_degraded, gather)
    ranking_slow = (shares * ranking_loss(cosines, views.is_wrong, scale_slow)).mean()
    ranking_fast = (shares * ranking_loss(contrasts, views.is_wrong, scale_fast)).mean()
    loss = semantic + config.temporal_weight * temporal + config.ranking_weight * (ranking_slow + ranking_fast)

    with torch.no_grad():
        found = offsets[similarity.argmax(dim=1)]
        metrics = {
            "loss": loss,
            "semantic": semantic,
            "temporal": temporal,
            "ranking_slow": ranking_slow,
            "ranking_fast": ranking_fast,
            "batch_r1": _retrieved(all_video @ all_audio.T),
            "offset_hit": ((found - views.offset).abs() <= config.offset_grid).float().mean(),
            "edit_hit_slow": _share_preferred(cosines, views.is_wrong),
            "edit_hit_fast": _share_preferred(contrasts, views.is_wrong),
            "scale_slow": scale_slow,
            "scale_fast": scale_fast,
        }
    return loss, {name: value.detach().float() for name, value in metrics.items()}


def _retrieved(cosines: Tensor) -> Tensor:
    rows = torch.arange(len(cosines), device=cosines.device)
    return (cosines.argmax(dim=1) == rows).float().mean()


def _offset_grid(config: LossConfig, device: torch.device) -> Tensor:
    steps = config.max_offset_steps // config.offset_grid
    return config.offset_grid * torch.arange(-steps, steps + 1, device=device)


def _share_preferred(scores: Tensor, is_wrong: Tensor) -> Tensor:
    """Share of the steps from one version to the next, more wrong one, at which the score [B, 1 + K] falls."""
    falls = (scores[:, :-1] > scores[:, 1:]) & is_wrong
    return falls.sum() / is_wrong.sum().clamp(min=1)


def _encode_sounds(model: SFCAVP, views: TrainingViews) -> tuple[Streams, Streams]:
    """Encode the offset sounds and, in the same pass, all others (B * (1 + K), a crop's sounds adjacent)."""
    others = rearrange(views.sounds, "b k m t -> (b k) m t")
    streams = model.encode_mel(torch.cat([views.offset_mel, others]))
    sizes = [len(views.offset_mel), len(others)]
    (slow, other_slow), (fast, other_fast) = streams.slow.split(sizes), streams.fast.split(sizes)
    return Streams(slow, fast), Streams(other_slow, other_fast)
