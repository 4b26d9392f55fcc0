"""What stages check of policy and reward before they work: of this code, of these clips, or one clear line."""

from pathlib import Path

import pytest
import torch

from models.reward import Reward
from models.weights import load_config, save_config
from pipelines.clip_stage import fingerprint_of_policy, fingerprint_of_reward
from pipelines.data.contracts import FEATURES
from pipelines.data.store import Dataset, files_manifest, read_manifest
from pipelines.errors import InputError
from pipelines.generation_steps import find_networks
from pipelines.stage import StageContext, run_stage
from tests.demo_factory import write_untrained_policy, write_untrained_reward
from tests.feature_factory import write_features


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("clip_stage")
    write_untrained_policy(made / "policy")
    write_untrained_reward(made / "reward")
    write_features(made / "features", {"train": 1})

    def older(context: StageContext) -> None:
        place = context.folder.local_path()
        names = Reward.load(made / "reward").save(place)
        config = load_config(place / "config.json", "sf_cavp")
        save_config(place / "config.json", {name: value for name, value in config.items() if name != "parts"})
        context.finish({"kind": "checkpoint", "files": files_manifest(context.folder, names)})

    run_stage(name="older", config={}, inputs={}, out=str(made / "older"), body=older, say=lambda line: None)
    return made


def test_what_fits_is_known_by_its_fingerprint(root: Path) -> None:
    features = Dataset.open(str(root / "features"), FEATURES)
    policy, reward = str(root / "policy"), str(root / "reward")
    assert fingerprint_of_policy(policy, features) == read_manifest(policy)["fingerprint"]
    assert fingerprint_of_reward(reward) == read_manifest(reward)["fingerprint"]


def test_a_checkpoint_of_another_kind_is_named(root: Path) -> None:
    features = Dataset.open(str(root / "features"), FEATURES)
    with pytest.raises(InputError, match="policy is not a reward"):
        fingerprint_of_reward(str(root / "policy"))
    with pytest.raises(InputError, match="reward is not a policy"):
        fingerprint_of_policy(str(root / "reward"), features)
    with pytest.raises(InputError, match="does not exist"):
        fingerprint_of_reward(str(root / "nothing"))


def test_a_reward_of_older_code_is_refused_by_every_door(root: Path) -> None:
    older, reason = str(root / "older"), "calibrated for other parts than this code has; train it again"
    with pytest.raises(InputError, match=reason):
        fingerprint_of_reward(older)
    with pytest.raises(InputError, match=reason):
        find_networks(str(root / "policy"), older, None, torch.device("cpu"))
