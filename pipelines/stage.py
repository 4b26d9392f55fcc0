"""A stage turns inputs into one artifact folder, and has four outcomes.

    nothing there                          -> run
    unfinished work, same fingerprint      -> resume
    finished, same fingerprint             -> skip
    anything of another fingerprint        -> refuse, naming the fields that differ

fingerprint = sha256(options that affect the bytes + inputs' fingerprints + contract version); numbers of workers and
paths are not part of it, so a run can be scaled or moved without being thrown away.

Every stage that has work to do is a run in MLflow, a child of the launch around it (`stage_run`); its body logs to
`context.tracker`.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any, Literal

from pipelines.data.lease import LEASE_FOLDER, Lease, acquire
from pipelines.data.storage import Folder, open_folder
from pipelines.data.store import MANIFEST, STORE_VERSION
from pipelines.errors import InputError, StageConflict
from pipelines.tracking import SilentTracker, Tracker, open_tracker

STARTED = "stage.json"
OWN_NAMES = frozenset({STARTED, "config.yaml", "metrics.jsonl", "journal", LEASE_FOLDER})

Outcome = Literal["run", "resume", "skip"]


def fingerprint_of(name: str, config: Mapping[str, Any], inputs: Mapping[str, str], version: int) -> str:
    """sha256 over a stage's name, byte-affecting options, inputs' fingerprints and contract version."""
    body = {"stage": name, "config": dict(config), "inputs": dict(inputs), "version": version}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a stage's body needs: where to write, under which fingerprint, and how to finish."""

    name: str
    folder: Folder
    fingerprint: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    resumed: bool
    version: int
    tracker: Tracker = field(default_factory=SilentTracker)
    """The stage's run in MLflow."""
    lease: Lease | None = None
    """The right to write the folder; None for those who call a body by itself."""
    _finished: list[bool] = field(default_factory=list)

    @property
    def out(self) -> str:
        """The output folder's path or URI."""
        return self.folder.uri

    def finish(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest: `content` (kind, parts or files, counts ...) with fingerprint and lineage; once.

        Raises:
            StageConflict: another process took this folder over, or finished this artifact in the meantime.
        """
        if self.lease is not None:
            self.lease.check()
        manifest = {
            "store_version": STORE_VERSION,
            "version": self.version,
            "stage": self.name,
            "fingerprint": self.fingerprint,
            "config": dict(self.config),
            "inputs": dict(self.inputs),
            "code": {"project": _own_version(), "python": sys.version.split()[0]},
            **content,
        }
        try:
            self.folder.write_bytes(MANIFEST, _json(manifest), only_if_absent=True)
        except FileExistsError:
            raise StageConflict(
                f"{self.out}: another process wrote {MANIFEST} meanwhile; its result stands, run the command again"
            ) from None
        self._finished.append(True)
        return manifest


def stage_run(context: StageContext) -> Tracker:
    """The MLflow run of a stage: its options as parameters, its fingerprint and its inputs' as tags."""
    return open_tracker(context.out, context.name, params=context.config, tags=lineage_tags(context))


def lineage_tags(context: StageContext) -> dict[str, str]:
    """The fingerprint of what a stage makes, and those of its inputs by role."""
    return {"fingerprint": context.fingerprint, **{f"input.{k}": v for k, v in context.inputs.items()}}


def untracked(context: StageContext) -> Tracker:
    """No MLflow run: for those who call a stage from a notebook or a test."""
    return SilentTracker()


def run_stage(
    *,
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    out: str,
    body: Callable[[StageContext], None],
    version: int = 1,
    options_yaml: str | None = None,
    track: Callable[[StageContext], Tracker] = stage_run,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Bring the artifact at `out` to completion and tell with one line how.

    Args:
        name: the stage's name.
        config: the options that affect the bytes; JSON values.
        inputs: fingerprint of every input artifact by its role.
        out: path or URI of the artifact's folder.
        body: does the work and ends in `context.finish(...)`; must pick up from what it finds in the folder.
        version: the contract's version.
        options_yaml: the resolved options in preset form, kept as `config.yaml` beside the artifact.
        track: opens the stage's run; not called for a skipped stage.
        say: where the one line goes.

    Raises:
        StageConflict: `out` holds the work of another configuration or foreign files, or another process writes it.
    """
    folder = open_folder(out)
    config = json.loads(json.dumps(dict(config)))
    fingerprint = fingerprint_of(name, config, inputs, version)
    started = {"stage": name, "config": config, "inputs": dict(inputs), "version": version}
    outcome = _outcome(folder, started, fingerprint)
    if outcome != "skip":
        with acquire(folder, say) as lease:
            # Again, since another process may have finished or begun while this one waited.
            outcome = _outcome(folder, started, fingerprint)
            if outcome == "run":
                folder.write_bytes(STARTED, _json({**started, "fingerprint": fingerprint}))
            if outcome != "skip":
                if options_yaml is not None:
                    folder.write_bytes("config.yaml", options_yaml.encode())
                say(f"{name}: {outcome}, {folder.uri} (fingerprint {fingerprint[:12]})")
                context = StageContext(
                    name=name,
                    folder=folder,
                    fingerprint=fingerprint,
                    config=config,
                    inputs=dict(inputs),
                    resumed=outcome == "resume",
                    version=version,
                    lease=lease,
                )
                _carry_out(context, body, track)
        # What is finished is guarded by its manifest.
        folder.delete_flat(LEASE_FOLDER)
    if outcome == "skip":
        say(f"{name}: skip, {folder.uri} is complete (fingerprint {fingerprint[:12]})")
    else:
        say(f"{name}: done, {folder.uri}")
    return outcome


def _carry_out(
    context: StageContext, body: Callable[[StageContext], None], track: Callable[[StageContext], Tracker]
) -> None:
    with track(context) as tracker:
        body(replace(context, tracker=tracker))
    if not context._finished:
        raise RuntimeError(f"stage {context.name} returned without a manifest for {context.out}")


def plan_stage(*, name: str, config: Mapping[str, Any], inputs: Mapping[str, str], out: str, version: int = 1) -> str:
    """What `run_stage` would do, as `run`, `resume`, `skip` or `refuse`; touches nothing."""
    config = json.loads(json.dumps(dict(config)))
    started = {"stage": name, "config": config, "inputs": dict(inputs), "version": version}
    try:
        return _outcome(open_folder(out), started, fingerprint_of(name, config, inputs, version))
    except StageConflict:
        return "refuse"


def _outcome(folder: Folder, started: Mapping[str, Any], fingerprint: str) -> Outcome:
    outcomes: tuple[tuple[str, Outcome], ...] = ((MANIFEST, "skip"), (STARTED, "resume"))
    for name, outcome in outcomes:
        if folder.exists(name):
            found = _read_json(folder, name)
            if found.get("fingerprint") != fingerprint:
                _refuse(folder, found, started)
            return outcome
    foreign = [n for n in folder.list_names() if n not in OWN_NAMES and not n.startswith(".")]
    if foreign:
        raise StageConflict(
            f"{folder.uri} is not empty and holds no stage's work ({', '.join(foreign[:3])}); give another --out"
        )
    return "run"


def _refuse(folder: Folder, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = []
    for group in ("stage", "version"):
        if found.get(group) != wanted[group]:
            differing.append(f"{group}: {found.get(group)} there, {wanted[group]} asked")
    for group in ("config", "inputs"):
        theirs, ours = found.get(group, {}), wanted[group]
        for key in sorted({*theirs, *ours}):
            if theirs.get(key) != ours.get(key):
                differing.append(f"{key}: {_short(theirs.get(key))} there, {_short(ours.get(key))} asked")
    raise StageConflict(
        f"{folder.uri} was made with other settings ({'; '.join(differing)}); "
        "give another --out, or run with the settings it was made with"
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    try:
        return json.loads(folder.read_bytes(name))
    except ValueError as error:
        raise InputError(
            f"{folder.uri}/{name} is not JSON ({error}); remove the folder or give another --out"
        ) from error


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _own_version() -> str:
    return metadata.version("multisoundgen-on-ray")
