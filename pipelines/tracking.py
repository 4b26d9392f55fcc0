"""Tracking: what people look at while a run goes and after it, in MLflow, without ever making the work wait.

One parent run a launch, one child run a stage. A tracker writes into a local journal (`tracking_journal`) and returns
at once; one background process a launch (`tracking_ship`) ships the journals of the launch and of its stages to
`MLFLOW_TRACKING_URI`, or to a SQLite store beside the results. So an outage costs no step: what could not be shipped
stays in the journal, is named at the end, and goes out with the next run or with `python jobs/doctor.py --ship`.

    with open_launch(out, "demo", params=..., tags=...) as launch:          # the driver
        with open_tracker(stage_out, "train_mmdit", params=..., tags=...) as tracker:
            tracker.metrics(step, {"loss": loss})

Inside the block of `open_launch` every tracker of this process, and of processes it starts, is a child of it. A Ray
Train worker inherits no environment: give it `parent=current_launch()`, taken in the driver.
"""

import hashlib
import io
import json
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from pipelines.tracking_journal import Journal, flatten, register_child, without_credentials
from pipelines.tracking_shipper import Shipper, default_store

LAUNCH_VARIABLE = "MULTISOUNDGEN_LAUNCH"

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Figure(Protocol):
    """What can draw itself as a picture, such as a matplotlib figure."""

    def savefig(self, fname: Any, /, *, format: str) -> None:
        """Write the picture to a file object."""
        ...


class Tracker(Protocol):
    """What a stage sees of tracking; no method waits for a network, none fails because of one."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Curves: one value a name at `step`; steps of one name only go up, a step seen before is not doubled."""
        ...

    def tags(self, values: Mapping[str, Any]) -> None:
        """Facts known later than the start, such as the fingerprint of what was written."""
        ...

    def image(self, name: str, image: bytes | Figure) -> None:
        """A picture: PNG bytes or a figure, as `images/<name>.png`."""
        ...

    def audio(self, name: str, wav: bytes) -> None:
        """A sound: the bytes of a wav file, as `audio/<name>.wav`."""
        ...

    def video(self, name: str, mp4: bytes) -> None:
        """A video with its sound: the bytes of an mp4 file, as `video/<name>.mp4`."""
        ...

    def document(self, name: str, content: bytes) -> None:
        """Anything else, such as an HTML page, under its name."""
        ...

    def close(self, status: Status = "FINISHED") -> None:
        """End the run."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LaunchReference:
    """What a child has to know of its launch; travels as text."""

    journal_id: str
    folder: str
    store: str

    def to_text(self) -> str:
        """The reference as one line."""
        return json.dumps({"journal_id": self.journal_id, "folder": self.folder, "store": self.store})


def current_launch() -> str | None:
    """Reference of the launch around this process; give it as `parent` to a tracker in a Ray worker."""
    return os.environ.get(LAUNCH_VARIABLE)


class JournalTracker:
    """A tracker that writes a journal; with a `Shipper` of its own when it has nobody else to ship for it."""

    def __init__(self, journal: Journal, shipper: Shipper | None, launch: "Launch | None" = None) -> None:
        self._journal = journal
        self._shipper = shipper
        self._launch = launch
        self._closed = False

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._journal.metrics(step, values)

    def tags(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._journal.append("tags", values=flatten(values))

    def image(self, name: str, image: bytes | Figure) -> None:
        """See `Tracker`."""
        if not isinstance(image, bytes):
            buffer = io.BytesIO()
            image.savefig(buffer, format="png")
            image = buffer.getvalue()
        self._journal.keep_bytes(f"images/{name}.png", image)

    def audio(self, name: str, wav: bytes) -> None:
        """See `Tracker`."""
        self._journal.keep_bytes(f"audio/{name}.wav", wav)

    def video(self, name: str, mp4: bytes) -> None:
        """See `Tracker`."""
        self._journal.keep_bytes(f"video/{name}.mp4", mp4)

    def document(self, name: str, content: bytes) -> None:
        """See `Tracker`."""
        self._journal.keep_bytes(name, content)

    def close(self, status: Status = "FINISHED") -> None:
        """See `Tracker`; a tracker that owns its launch ends that too."""
        if self._closed:
            return
        self._closed = True
        self._journal.append("close", status=status)
        self._journal.close()
        if self._journal.num_waiting or self._journal.num_lost:
            sys.stderr.write(
                f"tracking: the disk of {self._journal.folder} did not take {self._journal.num_waiting} records and "
                f"{self._journal.num_lost} artifacts; they are lost, free some space\n"
            )
        if self._shipper is not None:
            self._shipper.finish()
        if self._launch is not None:
            self._launch.close(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(_status_of(kind))


class Launch(JournalTracker):
    """The run of a whole launch; while it is open, trackers become its children."""

    def __init__(self, journal: Journal, shipper: Shipper, reference: LaunchReference) -> None:
        super().__init__(journal, shipper)
        self.reference = reference.to_text()
        """Give it as `parent` where no environment is inherited."""
        os.environ[LAUNCH_VARIABLE] = self.reference

    def close(self, status: Status = "FINISHED") -> None:
        """End the launch and wait, within limits, until all is shipped."""
        if os.environ.get(LAUNCH_VARIABLE) == self.reference:
            del os.environ[LAUNCH_VARIABLE]
        super().close(status)


class SilentTracker:
    """The tracker of the ranks that do not log."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def tags(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def image(self, name: str, image: bytes | Figure) -> None:
        """Nothing."""

    def audio(self, name: str, wav: bytes) -> None:
        """Nothing."""

    def video(self, name: str, mp4: bytes) -> None:
        """Nothing."""

    def document(self, name: str, content: bytes) -> None:
        """Nothing."""

    def close(self, status: Status = "FINISHED") -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return


def open_launch(out: str, name: str, *, params: Mapping[str, Any], tags: Mapping[str, Any]) -> Tracker:
    """The parent run of what follows; inside another launch, a child of that one instead.

    Args:
        out: folder of the launch's results; the journal lies in `<out>/journal`, so the same command run again
            continues the same run.
        name: the run's name.
        params: options, nested as they are; they are flattened, and what is called a token or a password is hidden.
        tags: lineage: fingerprints of inputs and the like.
    """
    parent = current_launch()
    if parent is not None:
        return open_tracker(out, name, params=params, tags=tags, parent=parent)
    return _own_launch(out, name, params, tags)


def open_tracker(
    out: str,
    stage_name: str,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, Any],
    parent: str | None = None,
    rank: int = 0,
) -> Tracker:
    """The run of one stage: a child of `parent`, else of the launch around, else of a launch of its own.

    Args:
        out: folder of the stage's artifact; the journal lies in `<out>/journal`.
        stage_name: the run's name.
        params: see `open_launch`.
        tags: see `open_launch`.
        parent: a launch's reference, as `current_launch()` gives it.
        rank: rank of this process; rank 0 alone logs.
    """
    if rank != 0:
        return SilentTracker()
    text = parent if parent is not None else current_launch()
    launch = None
    if text is None:
        launch = _own_launch(out, out.rstrip("/").rsplit("/", 1)[-1], params={}, tags={})
        text = launch.reference
    reference = LaunchReference(**json.loads(text))
    folder = journal_folder(out, "stage")
    journal, journal_id = _open_journal(folder, "stage", stage_name, params, tags, reference.journal_id)
    shipper = None
    if Path(reference.folder).is_dir() and folder.parent.parent == Path(out):
        register_child(Path(reference.folder), folder, journal_id)
    else:
        # The launch's shipper cannot see this journal (an object store, or a node of its own).
        shipper = Shipper(folder, reference.store)
    return JournalTracker(journal, shipper, launch)


def journal_folder(out: str, kind: Literal["launch", "stage"]) -> Path:
    """Where the journal of an artifact folder lies; for one on an object store, in this user's cache folder."""
    if "://" in out:
        name = hashlib.sha256(out.encode()).hexdigest()[:24]
        return Path.home() / ".cache" / "multisoundgen" / "journals" / name / kind
    return Path(out) / "journal" / kind


def _own_launch(out: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> Launch:
    store = default_store(out)
    if store.startswith("sqlite:///"):
        Path(store.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = journal_folder(out, "launch")
    journal, journal_id = _open_journal(folder, "launch", name, params, tags, None)
    reference = LaunchReference(journal_id=journal_id, folder=str(folder), store=without_credentials(store))
    return Launch(journal, Shipper(folder, store), reference)


def _open_journal(
    folder: Path,
    run_kind: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, Any],
    parent: str | None,
) -> tuple[Journal, str]:
    """Open the journal and write its `open` record; a later attempt keeps the run and adds what is new."""
    journal = Journal(folder)
    first = journal.first_open
    new_params, new_tags = flatten(params), flatten(tags)
    if first is not None:
        # Parameters of a run cannot change in MLflow: what differs now (more workers, say) becomes a tag.
        changed = {k: v for k, v in new_params.items() if first["params"].get(k, v) != v}
        new_tags |= {f"resumed.{k}": v for k, v in changed.items()}
        new_params = {k: v for k, v in new_params.items() if k not in changed}
    journal_id = first["journal_id"] if first is not None else uuid.uuid4().hex
    journal.append(
        "open",
        journal_id=journal_id,
        run_kind=run_kind,
        name=name,
        params=new_params,
        tags=new_tags,
        parent=first["parent"] if first is not None else parent,
    )
    return journal, journal_id


def _status_of(kind: type | None) -> Status:
    if kind is None:
        return "FINISHED"
    return "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
