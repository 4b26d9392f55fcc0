"""Where the cells of a study lie, and what can be read from those that are done.

out/world, out/features                     shared by all replicates
out/m0_world, out/m0_features               M_0's own training clips, where it has some
out/seed_<s>/m0
out/seed_<s>/degraded                       real sounds made worse by it, where a reward learns from them
out/seed_<s>/rewards/<reward>               one SF-CAVP of each kind
out/seed_<s>/val/m0_by_<reward>             M_0's candidates on val, scored by it: may it rank?
out/seed_<s>/val/codec                      the real sounds of val after the codec
out/seed_<s>/arms/<arm>                     preference rounds, or a longer training
out/seed_<s>/test/<subject>                 the table's scores
out/results                                 tables and figures
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.data.storage import open_folder
from pipelines.data.store import is_finished
from pipelines.evaluation.evaluate import measures, read_scores
from pipelines.evaluation.scores import ClipScores
from pipelines.evaluation.study import BASELINE, CODEC, Arm, Study
from pipelines.evaluation.study_results import RankingResult, ranking_result
from pipelines.preferences.rounds import baseline_scores, round_folders
from pipelines.training.journal import parse_journal
from pipelines.training.workplace import JOURNAL

LAST_SHARE = 0.2
"""Share of a round's steps, at its end, over which displacements are averaged."""
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Replicate:
    """The folders of one seed."""

    out: str
    seed: int

    @property
    def base(self) -> str:
        """The folder of all of it."""
        return f"{self.out}/seed_{self.seed}"

    @property
    def m0(self) -> str:
        """Its M_0."""
        return f"{self.base}/m0"

    @property
    def degraded(self) -> str:
        """Real sounds made worse by its M_0."""
        return f"{self.base}/degraded"

    def reward(self, name: str) -> str:
        """Its SF-CAVP of a kind."""
        return f"{self.base}/rewards/{name}"

    def ranked(self, reward: str) -> str:
        """Scores of M_0's candidates on val by a reward."""
        return f"{self.base}/val/m0_by_{reward}"

    @property
    def codec_on_val(self) -> str:
        """Scores of the real sounds of val after the codec."""
        return f"{self.base}/val/codec"

    def arm(self, name: str) -> str:
        """What an arm made."""
        return f"{self.base}/arms/{name}"

    def tested(self, subject: str) -> str:
        """Scores of a subject on test."""
        return f"{self.base}/test/{subject}"


def read_cells(study: Study, out: str) -> dict[str, dict[int, ClipScores]]:
    """Scores on test of every subject and replicate that are done, in the study's order, beside the codec's."""
    found: dict[str, dict[int, ClipScores]] = {}
    for subject in study.subjects:
        places = _finished(out, study.seeds_of(subject), lambda folders, name=subject: folders.tested(name))
        if places:
            found[subject] = {seed: read_scores(place)[0] for seed, place in places.items()}
    codec = found.get(CODEC, {})
    return {
        subject: {seed: one.beside_codec(codec[seed]) if seed in codec else one for seed, one in by_seed.items()}
        for subject, by_seed in found.items()
    }


def read_val_cells(study: Study, out: str) -> dict[str, dict[int, ClipScores]]:
    """Scores on val of M_0 and of what every arm of rounds that is done ended with: what a decision may read.

    Without arms on M_0's own clips, whose val is another.
    """
    places = _finished(out, study.seeds, lambda folders: folders.codec_on_val)
    codec = {seed: read_scores(place)[0] for seed, place in places.items()}

    def beside_codec(seed: int, place: str) -> ClipScores:
        # A launch scores a sample of val, the same in every arm of a replicate.
        scores = read_scores(place)[0]
        return scores.beside_codec(codec[seed].of_clips(scores.clip_ids)) if seed in codec else scores

    found: dict[str, dict[int, ClipScores]] = {}
    for arm in filter(study.learns_from_world, _arms_of_rounds(study)):
        for seed, place in _done(arm, out).items():
            if seed not in found.setdefault(BASELINE, {}):
                found[BASELINE][seed] = beside_codec(seed, baseline_scores(place))
            last = round_folders(place, study.num_rounds(arm) - 1).scores
            found.setdefault(arm.name, {})[seed] = beside_codec(seed, last)
    return found


def read_rankings(study: Study, out: str) -> dict[str, dict[int, RankingResult]]:
    """How well every reward that is done ranks, by kind and replicate."""
    found: dict[str, dict[int, RankingResult]] = {}
    for reward in study.rewards:
        places = _finished(out, study.seeds, lambda folders, name=reward: folders.ranked(name))
        if places:
            found[reward] = {seed: ranking_result(read_scores(place)[0]) for seed, place in places.items()}
    return found


def read_rounds(study: Study, out: str) -> tuple[dict[str, Points], dict[str, Points]]:
    """Of every arm of rounds that is done, means over replicates, round by round.

    Returns:
        (reward, class-aware F1) on val minus M_0's, of M_0 and after each round: arms of other replicates start at the
        same point; (loser's, winner's) displacement at each end.
    """
    scored: dict[str, Points] = {}
    moved: dict[str, Points] = {}
    for arm in _arms_of_rounds(study):
        places = list(_done(arm, out).values())
        if places:
            scored[arm.name] = _mean([_scores_by_round(place, study.num_rounds(arm)) for place in places])
            moved[arm.name] = _mean([_displacements(place, study.num_rounds(arm)) for place in places])
    return scored, moved


def _arms_of_rounds(study: Study) -> list[Arm]:
    return [arm for arm in study.arms if arm.job == "rpo_rounds"]


def _done(arm: Arm, out: str) -> dict[int, str]:
    """Folder of an arm by replicate, where it is done."""
    return _finished(out, arm.seeds, lambda folders: folders.arm(arm.name))


def _finished(out: str, seeds: Sequence[int], place_of: Callable[[Replicate], str]) -> dict[int, str]:
    """A folder of each replicate, where it is finished."""
    places = {seed: place_of(Replicate(out, seed)) for seed in seeds}
    return {seed: place for seed, place in places.items() if is_finished(place)}


def policies(study: Study, arm: Arm, place: str) -> dict[str, str]:
    """Subject -> folder of the policy that an arm at `place` ends with; its gate reports and refuses none."""
    if arm.job == "train_mmdit":
        return {arm.name: place}
    last = round_folders(place, study.num_rounds(arm) - 1)
    return dict(zip(arm.subjects, (last.policy, last.control), strict=False))


def _scores_by_round(place: str, num_rounds: int) -> Points:
    places = [baseline_scores(place), *(round_folders(place, index).scores for index in range(num_rounds))]
    found = [measures(scores) for scores in places]
    points = [(values["reward"], values["class_f1"]) for values in found]
    return [(reward - points[0][0], f1 - points[0][1]) for reward, f1 in points]


def _displacements(place: str, num_rounds: int) -> Points:
    points = []
    for index in range(num_rounds):
        records = parse_journal(open_folder(round_folders(place, index).policy).read_bytes(JOURNAL))
        last = records[-max(1, round(LAST_SHARE * len(records))) :]
        both = ([r[name] for r in last] for name in ("loser_displacement", "winner_displacement"))
        loser, winner = (float(np.mean([value for value in values if value is not None])) for values in both)
        points.append((loser, winner))
    return points


def _mean(of_replicates: list[Points]) -> Points:
    means = np.mean(np.array(of_replicates), axis=0)
    return [(float(x), float(y)) for x, y in means]
