"""Published MMAudio files -> one artifact that the other stages open as a policy.

Every file is identified and checked before anything is written, and read a second time to be written: so a wrong file
leaves nothing behind, and never more than one file is in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from models.mmdit import SPEC_OF_SIZE
from models.policy import CONFIG_FILE, KIND, NETWORK_FILE
from models.pretrained import FILE_OF_ROLE as FROZEN_FILES
from models.weights import save_config
from pipelines.data.storage import Folder, open_folder
from pipelines.data.storage_faults import weights_failure
from pipelines.data.store import CHECKPOINT, files_manifest
from pipelines.errors import InputError
from pipelines.public_files import FileIdentity, identify, local_file, read_state_dict
from pipelines.public_models import (
    PUBLIC_MODELS,
    ROLES,
    PublicModel,
    check_identity,
    find_model,
    refuse_other_size,
)
from pipelines.stage import Outcome, StageContext, plan_stage, run_stage, stage_run
from pipelines.tracking import Tracker

STAGE = "import_mmaudio"
FILE_OF_ROLE = {"network": NETWORK_FILE, **FROZEN_FILES}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file to import."""

    model: PublicModel
    """What it has to be."""
    identity: FileIdentity
    is_published: bool
    """Whether it is the published file, by its md5."""

    def read(self, models: Sequence[PublicModel]) -> dict[str, Tensor]:
        """The checked weights under our modules' names.

        Raises:
            InputError: the file is broken or holds other weights.
        """
        path = self.identity.path
        state = read_state_dict(path, self.model.entry)
        try:
            return self.model.checked(state, str(path))
        except InputError:
            refuse_other_size(self.model, state, str(path), models)
            raise

    def describe(self) -> str:
        """The line that a person sees: file, checksum, licence."""
        known = "as published" if self.is_published else "not the published file"
        if self.model.md5 is None:
            known = "no checksum of it is on record here: compare it with its publisher's"
        return (
            f"{self.model.role} {self.model.variant}: {self.identity.path.name}, md5 {self.identity.md5} ({known}); "
            f"licence of the weights: {self.model.licence}"
        )


def import_mmaudio(
    *,
    files: Mapping[str, str],
    size: str,
    out: str,
    trust_unknown_checksum: bool = False,
    models: Sequence[PublicModel] = PUBLIC_MODELS,
    options_yaml: str | None = None,
    track: Callable[[StageContext], Tracker] = stage_run,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Make a policy of a named size, and what else is given, from published files; the network is required.

    Args:
        files: path of the file by role (`public_models.ROLES`), or hf://OWNER/REPOSITORY/FILE in the hub's cache.
        size: the policy's size.
        out: the artifact's folder.
        trust_unknown_checksum: take files whose md5 is not the one on record.
        models: what the files may be.
        options_yaml: the resolved options in preset form.
        track: opens the stage's run.
        say: where lines go.

    Raises:
        InputError: a file is missing, broken, not what its option says, or unknown and not trusted.
        EnvironmentFailed: the artifact cannot be written.
    """
    if "network" not in files:
        raise InputError("--network is missing: a policy is its network; give mmaudio_<size>.pth")
    open_folder(out)  # Before gigabytes are read.
    sources: list[Source] = []
    for role in (role for role in ROLES if role in files):
        model, identity = find_model(models, role, size), identify(local_file(role, files[role]))
        is_published = check_identity(model, identity, models, trust_unknown=trust_unknown_checksum)
        sources.append(Source(model=model, identity=identity, is_published=is_published))

    config = {"size": size}
    inputs = {source.model.role: source.identity.sha256 for source in sources}
    if plan_stage(name=STAGE, config=config, inputs=inputs, out=out) in ("run", "resume"):
        for source in sources:
            say(f"{STAGE}: {source.describe()}")
            source.read(models)

    def body(context: StageContext) -> None:
        _write(context, sources, models, size)

    return run_stage(
        name=STAGE,
        config=config,
        inputs=inputs,
        out=out,
        body=body,
        options_yaml=options_yaml,
        track=track,
        say=say,
    )


def _write(context: StageContext, sources: Sequence[Source], models: Sequence[PublicModel], size: str) -> None:
    context.folder.remove_temporaries()
    names = [CONFIG_FILE]
    for source in sources:
        name = FILE_OF_ROLE[source.model.role]
        _save(context.folder, name, source.read(models))
        names.append(name)
    spec = SPEC_OF_SIZE[size]
    # The three fields of Policy.save, so that this is a policy as any other; what it was made from is in the manifest.
    with context.folder.new_file(CONFIG_FILE) as path:
        save_config(path, {"kind": KIND, "size": size, "spec": spec})
    described = {source.model.role: _entry(source) for source in sources}
    files = files_manifest(context.folder, names)
    context.finish({"kind": CHECKPOINT, "size": size, "spec": spec, "files": files, "sources": described})
    context.tracker.tags({f"source.{source.model.role}": source.describe() for source in sources})


def _entry(source: Source) -> dict[str, str | int | bool]:
    identity = source.identity
    return {
        "file": FILE_OF_ROLE[source.model.role],
        "variant": source.model.variant,
        "licence": source.model.licence,
        "made_from": identity.path.name,
        "bytes": identity.bytes,
        "md5": identity.md5,
        "sha256": identity.sha256,
        "is_published": source.is_published,
    }


def _save(folder: Folder, name: str, state: Mapping[str, Tensor]) -> None:
    """Write float32 safetensors, visible only when whole; tensors that are mapped from a file are not copied.

    Raises:
        InputError: the storage refuses.
        EnvironmentFailed: the disk is full, read-only or gone, or storage fails after retries.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in state.items():
        dense = tensor.to(torch.float32).contiguous()
        # The format holds no two names for one memory, as a file with tied weights has.
        memory = dense.untyped_storage().data_ptr()
        tensors[key] = dense.clone() if memory in seen else dense
        seen.add(memory)
    with folder.new_file(name) as path:
        try:
            save_file(tensors, path)
        except SafetensorError as error:
            raise weights_failure(error, f"{folder.uri}/{name}") from error
