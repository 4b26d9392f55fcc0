"""What the stages that work through a dataset's clips have in common: policy and reward that fit, and few rejects."""

from models.policy import CONFIG_FILE, KIND, POLICY_FILES
from models.reward import read_reward_config
from models.spec import SPECS
from models.weights import load_config
from pipelines.data.store import CHECKPOINT, Dataset, open_local_files, read_manifest
from pipelines.errors import InputError, Refused


def fingerprint_of_policy(location: str, features: Dataset) -> str:
    """Verify the policy at a place and return its fingerprint; raises InputError where it is not for these clips."""
    folder, manifest = open_local_files(location, CHECKPOINT, only=POLICY_FILES)
    try:
        spec_name = load_config(folder / CONFIG_FILE, KIND).get("spec")
    except ValueError as error:
        raise InputError(f"{location} is not a policy: {error}") from error
    if features.spec != SPECS.get(str(spec_name)):
        raise InputError(
            f"{location} is a policy for clips of spec '{spec_name}', {features.folder.uri} has clips of "
            f"'{features.spec.name}' of {features.spec.duration_s:g} s; give features made for that policy"
        )
    return manifest["fingerprint"]


def fingerprint_of_reward(location: str) -> str:
    """Verify the reward at a place and return its fingerprint; raises InputError where this code cannot use it."""
    folder, manifest = open_local_files(location, CHECKPOINT)
    try:
        read_reward_config(folder)
    except ValueError as error:
        raise InputError(f"{location} is not a reward: {error}") from error
    return manifest["fingerprint"]


def refuse_many_rejects(out: str, max_reject_rate: float) -> None:
    """Raise Refused where more than a share of the clips of a finished dataset was rejected."""
    counts = read_manifest(out, kind="dataset")["counts"]
    if counts["rejected"] > max_reject_rate * counts["in"]:
        raise Refused(
            f"{out}: {counts['rejected']} of {counts['in']} clips were rejected, more than --max-reject-rate "
            f"{max_reject_rate:g}; look at its rejects, then repair the features or raise the rate"
        )
