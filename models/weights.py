"""Weights in and out: the one module of this layer that touches files. Safetensors only.

Loads are strict: every missing, unknown or differently shaped name is in the error.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

LEGACY_MMDIT_KEYS = ("t_embed.freqs", "latent_rot", "clip_rot")
"""Tables that old public checkpoints carry; they are recomputed, so an import drops them."""

MAX_NAMES_IN_ERROR = 8


def save_weights(path: Path, state_dict: dict[str, Tensor]) -> None:
    """Write tensors (any device) as safetensors; visible under `path` only when complete."""
    tensors = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in state_dict.items()}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial)
    partial.replace(path)


def load_weights(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file; ValueError names the file if it is missing, foreign or cut short."""
    if not path.is_file():
        raise ValueError(f"no weights at {path}; give the folder of a finished checkpoint")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or export it again") from error


def without_legacy_mmdit_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """An MM-DiT state dict without the tables that old public files carry; then the load is strict."""
    return {name: tensor for name, tensor in state_dict.items() if name not in LEGACY_MMDIT_KEYS}


def load_strict(module: nn.Module, state_dict: dict[str, Tensor], source: str) -> None:
    """Load every weight of `module`, none missing and none left over; `source` says in the error where they are from.

    Works on a module of any dtype and device (values are cast). Raises ValueError with the offending names.
    """
    _check_fit(module, state_dict, source)
    module.load_state_dict(state_dict, strict=True)


def build_loaded(build: Callable[[], Network], state_dict: dict[str, Tensor], source: str) -> Network:
    """A module whose weights ARE the given tensors: none is drawn, none copied; `source` as for `load_strict`.

    The module must not have buffers outside its state dict. Raises ValueError with the offending names.
    """
    with torch.device("meta"):
        module = build()
    _check_fit(module, state_dict, source)
    module.load_state_dict(state_dict, strict=True, assign=True)
    return module


def _check_fit(module: nn.Module, state_dict: dict[str, Tensor], source: str) -> None:
    expected = module.state_dict()
    problems = [
        *_named("missing", sorted(expected.keys() - state_dict.keys())),
        *_named("unknown", sorted(state_dict.keys() - expected.keys())),
        *_named(
            "of another shape",
            [
                f"{name} {list(state_dict[name].shape)} instead of {list(expected[name].shape)}"
                for name in sorted(expected.keys() & state_dict.keys())
                if state_dict[name].shape != expected[name].shape
            ],
        ),
    ]
    if problems:
        raise ValueError(f"weights from {source} do not fit {type(module).__name__}: {'; '.join(problems)}")


def _named(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:MAX_NAMES_IN_ERROR])
    more = f" and {len(names) - MAX_NAMES_IN_ERROR} more" if len(names) > MAX_NAMES_IN_ERROR else ""
    return [f"{len(names)} {what}: {shown}{more}"]


def save_config(path: Path, config: dict[str, object]) -> None:
    """Write the JSON that says what the weights beside it are; visible only when complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def load_config(path: Path, kind: str) -> dict[str, object]:
    """Read such a JSON; ValueError if it is missing, broken or of another `kind`."""
    if not path.is_file():
        raise ValueError(f"no {path.name} in {path.parent}; give the folder of a finished checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.get("kind") != kind:
        raise ValueError(f"{path} does not describe a checkpoint of kind {kind!r}")
    return config
