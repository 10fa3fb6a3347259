"""Sends recorded runs to MLflow; the only module that imports it.

    python -m tasks.stage.tracking RUN_FOLDER WRITER_PID     follows one run until it ends (a stage starts this)

Sending is replaying the spool: every step may be repeated without a second effect, so a run that was sent
halfway, or twice, is there once. Which server is asked, and as whom, comes from MLflow's own environment
variables alone.

MLflow's client takes seconds of a core to load. So the sender of a pipeline's run sends the runs of its stages
too: their own senders leave it to that one while it lives, and only wait for its answer.
"""

import json
import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.stage.errors import TryAgain, one_line, say
from tasks.stage.files import write_json
from tasks.stage.lock import Lock, holder
from tasks.stage.recorder import SPOOL, Recorder, Status, numbers
from tasks.stage.secrets import redact

DEFAULT_STORE = "sqlite:///mlflow.db"
DEFAULT_EXPERIMENT = "lifecycle"
RECORDING = "lifecycle.recording"  # the tag by which a run that was sent before is found again
LEFT = "left_to"  # in the folder of a stage's run: which pipeline's sender shall send it
ANSWERS = "answers"  # in the folder of a pipeline's run: what became of them
POINTS_AT_ONCE = 1000  # MLflow's own limits for one batch
PARAMS_AT_ONCE = 100
PARAM_LENGTH = 6000
DIGEST_LENGTH = 36
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_BETWEEN_SENDS = 1.0
SECONDS_AFTER_FAILURE = 5.0
SECONDS_AFTER_END = 2.0  # how long sending is tried again once the run is over


# --- what the flow calls: the run of a whole pipeline, parent of its stages' runs


def start_parent(name: str, tags: Mapping[str, str]) -> Recorder:
    """Start the run of a pipeline. Its `id` goes to the stages in LIFECYCLE_PARENT_RUN_ID."""
    parent = Recorder(name, tags)
    parent.start_sending()
    return parent


def end_parent(parent: Recorder, status: Status) -> str | None:
    """End the run of a pipeline and give its MLflow id; None when it is kept for later."""
    return parent.end(status)


def link(parent: Recorder, stage: str, fingerprint: str, metrics: Mapping[str, Any]) -> None:
    """Record in the pipeline's run what `stage` contributed: the run that made its outputs, found by their
    fingerprint, now or in an earlier pipeline, and its metrics as STAGE.METRIC. Comparing two pipelines then
    compares all their stages, cached ones too."""
    parent.link(stage, fingerprint)
    parent.metrics(numbers({stage: metrics}))


def tag_committed(parent: Recorder, recording: str, outs: Mapping[str, str], commit: str | None) -> None:
    """Tag a stage's run, named by its recording's id, with the hashes of the outputs that DVC has committed."""
    tags = {f"dvc.out.{path}": digest for path, digest in outs.items()}
    parent.tag_run(recording, tags | ({"git.commit": commit} if commit else {}))


def prepare_store(root: Path) -> str:
    """The address of the store for processes that run in other folders. The experiment is made in it from here,
    since that is where the files of runs will lie. A store that does not answer now is no fault: runs are kept.
    """
    wanted = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
    if (file := wanted.removeprefix("sqlite:///")) != wanted:
        wanted = f"sqlite:///{root / file}"
    with _quiet(), suppress(Exception):
        _experiment(_client())
    return wanted


# --- later


@dataclass
class Uploaded:
    """The runs that were sent, those that are still here, and why sending stopped."""

    sent: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    problem: str | None = None


def upload(spool: Path = SPOOL) -> Uploaded:
    """Send every run that nobody is writing or sending; runs whose writer was killed end as KILLED."""
    result = Uploaded()
    with _quiet():
        for folder in _waiting(spool):
            if result.problem is None:
                try:
                    _finish(folder)
                except Exception as error:
                    result.problem = f"{address()}: {_reason(error)}"
            (result.kept if folder.is_dir() else result.sent).append(folder.name)
    return result


def _finish(folder: Path) -> None:
    """Send all of one run that nobody writes any more, unless somebody else is doing so."""
    lock = Lock(folder / "sender")
    if not lock.acquire():
        return
    try:
        sending = Sending(folder)
        sending.end_if_killed()
        sending.send()
    finally:
        lock.release()


def address() -> str:
    """Where runs are sent, without user and password."""
    return redact(os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE)


def _waiting(spool: Path) -> list[Path]:
    """The runs that no process is writing or sending; pipelines last: they point at runs of stages."""
    found = [
        events.parent
        for events in sorted(spool.glob("[!.]*/events.jsonl"))
        if holder(events.parent / "writer") is None and holder(events.parent / "sender") is None
    ]
    return sorted(
        (folder for folder in found if _start_event(folder)),
        key=lambda folder: _start_event(folder)["parent"] is None,
    )


def _start_event(folder: Path) -> dict[str, Any]:
    """The first event; empty when the writer was killed before it wrote anything."""
    with (folder / "events.jsonl").open(encoding="utf-8") as file:
        line = file.readline()
    event: dict[str, Any] = json.loads(line) if line.endswith("\n") else {}
    return event


# --- what others may ask


def known(ids: Iterable[str]) -> dict[str, tuple[dict[str, float], dict[str, str]]]:
    """(last metrics, tags) of each of these MLflow runs that the store has, by id.

    Raises whatever MLflow raises for a store that does not answer. A local store is not made for this.
    """
    if _no_store():
        return {}
    with _quiet():
        client = _client()
        from mlflow.exceptions import MlflowException

        found = {}
        for run_id in ids:
            try:
                data = client.get_run(run_id).data
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                found[run_id] = (dict(data.metrics), dict(data.tags))
        return found


def _no_store() -> bool:
    """Whether runs would go to a local store that was never made."""
    return (
        not os.environ.get("MLFLOW_TRACKING_URI")
        and not Path(DEFAULT_STORE.removeprefix("sqlite:///")).exists()
    )


@dataclass(frozen=True)
class KnownRun:
    """A run that the store has."""

    id: str
    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


def runs_by_id(start: str) -> list[KnownRun]:
    """The runs whose ids begin with `start`. Raises TryAgain when the store does not answer."""
    if _no_store():
        return []
    with _asked() as client:
        found = client.search_runs([_experiment(client)], f"attributes.run_id LIKE '{start}%'", max_results=10)
        return [
            KnownRun(
                each.info.run_id,
                each.info.run_name or "run",
                dict(each.data.params),
                dict(each.data.metrics),
                dict(each.data.tags),
            )
            for each in found
        ]


def params_of_stages(pipeline: KnownRun) -> dict[str, str]:
    """SECTION.KEY → text, from the runs of the stages that a pipeline's run is linked to; for pipelines that
    were recorded without params of their own. Raises TryAgain when the store does not answer."""
    found: dict[str, str] = {}
    with _asked() as client:
        for tag, run in pipeline.tags.items():
            if linked := re.fullmatch(r"stage\.(.+)\.run_id", tag):
                for key, value in client.get_run(run).data.params.items():
                    shared = key.partition(".")[0] in ("seed", "compute")
                    found[key if shared else f"{linked[1]}.{key}"] = value
    return found


def newest_run(tags: Mapping[str, str]) -> str | None:
    """The id of the newest run with these tags, or None. Raises TryAgain when the store does not answer."""
    if _no_store():
        return None
    with _asked() as client:
        return find_run(client, tags)


def share_view(key: str, state: Mapping[str, Any]) -> str | None:
    """Keep a view of the runs page (search, columns, charts) under a key that its address names, as the "Share"
    of the UI does. Gives the experiment's id; None when there is no store. Raises TryAgain."""
    if _no_store():
        return None
    with _asked() as client:
        experiment = _experiment(client)
        client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{key}", json.dumps(state))
        return experiment


@contextmanager
def _asked() -> Iterator[Any]:
    """A client for a question. Raises TryAgain when the store does not answer."""
    from mlflow.exceptions import MlflowException

    try:
        with _quiet():
            yield _client()
    except MlflowException as error:
        raise TryAgain(f"the tracking store {address()} refuses: {_reason(error)}") from error


# --- one run


class Sending:
    """Replays the events of one spool folder from where the last attempt stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_id = ""
        self.done = False
        self.ended = False
        self._pending: list[tuple[int, dict[str, Any]]] = []  # (offset behind the event, event)
        self._read = int(_read_text(folder / "sent") or 0)

    def look(self) -> bool:
        """Read the events that were written since the last look; whether there is anything to send."""
        with (self.folder / "events.jsonl").open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                if event := _parse(line):
                    self._pending.append((self._read, event))
                    self.ended |= event["kind"] == "end"
        return bool(self._pending)

    def end_if_killed(self) -> None:
        """Write the end that a killed writer could not."""
        self.look()
        if not self.ended:
            event = {"kind": "end", "status": "KILLED", "time": time.time_ns() // 1_000_000}
            with (self.folder / "events.jsonl").open("ab") as file:
                file.write(b"\n" + json.dumps(event).encode() + b"\n")

    def send(self) -> None:
        """Send what is there. Raises whatever MLflow raises; what was sent until then is not sent again."""
        from mlflow.exceptions import MlflowException

        try:
            self._send_pending()
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._forget()  # the run was begun in another store, or is deleted there
            self._send_pending()

    def _forget(self) -> None:
        for name in ("run_id", "sent"):
            (self.folder / name).unlink(missing_ok=True)
        self.run_id, self._read, self._pending = "", 0, []

    def _send_pending(self) -> None:
        self.look()
        if not self._pending:
            return
        client = _client()
        self.run_id = self.run_id or ensure_run(client, self.folder)
        while self._pending:
            batch = _batch(self._pending)
            self._send(client, [event for _, event in batch])
            self._pending = self._pending[len(batch) :]
            if not self.done:
                (self.folder / "sent").write_text(str(batch[-1][0]), encoding="ascii")
        if self.done:
            sent = self.folder.rename(self.folder.with_name(f".{self.folder.name}"))  # gone for others at once
            shutil.rmtree(sent)

    def _send(self, client: Any, events: list[dict[str, Any]]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._replay(client, events)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            reason = redact(one_line(error))[:200]
            say(f"warning: MLflow refuses a {events[0]['kind']} of {self.folder.name}: {reason}")

    def _replay(self, client: Any, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        event = events[0]
        match event["kind"]:
            case "metrics":
                points = [
                    Metric(name, value, each["time"], each["step"])
                    for each in events
                    for name, value in each["values"].items()
                ]
                client.log_batch(self.run_id, metrics=points)
            case "params":
                params = [Param(name, str(value)[:PARAM_LENGTH]) for name, value in event["values"].items()]
                for first in range(0, len(params), PARAMS_AT_ONCE):
                    client.log_batch(self.run_id, params=params[first : first + PARAMS_AT_ONCE])
            case "tags":
                client.log_batch(
                    self.run_id, tags=[RunTag(name, value) for name, value in event["values"].items()]
                )
            case "artifact":
                self._send_file(client, event["file"])
            case "table":
                self._send_file(client, event["file"])
                self._announce_table(client, event["file"])
            case "dataset":
                client.log_inputs(self.run_id, [_dataset(event)])
            case "link":
                self._link(client, event)
            case "tag_run":
                self._tag_other(client, event)
            case "end":
                client.set_terminated(self.run_id, event["status"], end_time=event["time"])
                self.done = True

    def _send_file(self, client: Any, name: str) -> None:
        file = self.folder / "files" / name
        if file.is_file():
            folder = Path(name).parent.as_posix()
            client.log_artifact(self.run_id, str(file), artifact_path=None if folder == "." else folder)

    def _announce_table(self, client: Any, name: str) -> None:
        """Tell the UI which artifacts are tables."""
        known = json.loads(client.get_run(self.run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        entry = {"path": name, "type": "table"}
        if entry not in known:
            client.set_tag(self.run_id, "mlflow.loggedArtifacts", json.dumps([*known, entry]))

    def _tag_other(self, client: Any, event: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        folder = self.folder.parent / event["run"]
        if folder.is_dir():  # one that is not sent yet can be tagged all the same
            run: str | None = ensure_run(client, folder)
        else:
            run = find_run(client, {RECORDING: folder.name})
        if run is not None:
            client.log_batch(run, tags=[RunTag(name, value) for name, value in event["values"].items()])

    def _link(self, client: Any, event: Mapping[str, Any]) -> None:
        run = find_run(
            client, {"dvc.stage": event["stage"], "dvc.fingerprint": event["fingerprint"]}, "FINISHED"
        )
        if run is not None:
            client.set_tag(self.run_id, f"stage.{event['stage']}.run_id", run)


def ensure_run(client: Any, folder: Path) -> str:
    """The MLflow id of the run in `folder`, which is created when it was never sent before."""
    lock = Lock(folder.parent / "create.lock")  # two senders may want the same parent
    lock.acquire(wait=True)
    try:
        return _find_or_create(client, folder)
    finally:
        lock.release()


def _find_or_create(client: Any, folder: Path) -> str:
    run_id = _read_text(folder / "run_id")
    if not run_id:
        run_id = find_run(client, {RECORDING: folder.name}) or _create(client, folder)
        (folder / "run_id").write_text(run_id, encoding="ascii")
    return run_id


def _create(client: Any, folder: Path) -> str:
    start = _start_event(folder)
    tags = {**start["tags"], RECORDING: folder.name, "mlflow.source.name": start["name"]}
    if start["parent"] is not None:
        tags["mlflow.parentRunId"] = _parent_id(client, folder.parent / start["parent"])
    run = client.create_run(_experiment(client), start["time"], tags=tags, run_name=start["name"])
    return str(run.info.run_id)


def _parent_id(client: Any, parent: Path) -> str:
    """The parent may be a recording that is here, one that was sent already, or any MLflow run."""
    if parent.is_dir():
        return _find_or_create(client, parent)
    return find_run(client, {RECORDING: parent.name}) or parent.name


def find_run(client: Any, tags: Mapping[str, str], status: str | None = None) -> str | None:
    """The id of the newest run with these tags, or None."""
    conditions = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
    if status is not None:
        conditions.append(f"attributes.status = '{status}'")
    found = client.search_runs(
        [_experiment(client)], " and ".join(conditions), max_results=1, order_by=["attributes.start_time DESC"]
    )
    return str(found[0].info.run_id) if found else None


def _experiment(client: Any) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT)
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found is not None else client.create_experiment(name))


def _client() -> Any:
    # a server that does not answer is asked again by us, later: not by the client, while somebody waits
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # stdout is for results
    from mlflow import MlflowClient

    return MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE)


def _dataset(event: Mapping[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=event["name"],
        digest=event["digest"][:DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"uri": event["path"]}),
        profile=json.dumps({"num_rows": event["rows"], "digest": event["digest"]}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", event["name"])])


def _batch(pending: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """The first event, with those right behind it that can go in one request."""
    points = 0
    for index, (_, event) in enumerate(pending):
        points += len(event["values"]) if event["kind"] == "metrics" else POINTS_AT_ONCE + 1
        if points > POINTS_AT_ONCE:
            return pending[: max(index, 1)]
    return pending


def _parse(line: bytes) -> dict[str, Any] | None:
    """One event; None for a line that a killed writer left unfinished."""
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return event


def _read_text(file: Path) -> str:
    return file.read_text(encoding="ascii") if file.is_file() else ""


# --- the sender of a running stage


class Following:
    """Sends one run while it is written: tries again after a failure, and for a while after the run's end."""

    def __init__(self, folder: Path) -> None:
        self.sending = Sending(folder)
        self.problem: str | None = None  # why it could not be sent, the first time
        self._next_try, self._give_up = 0.0, math.inf

    @property
    def over(self) -> bool:
        """Whether all is sent, or what is left is kept for later."""
        return self.sending.done or time.monotonic() >= self._give_up

    def step(self) -> None:
        """Send what is new, if there is anything and it is time."""
        waiting = self.sending.look()
        if self.sending.ended and self._give_up == math.inf:
            self._next_try, self._give_up = 0.0, time.monotonic() + SECONDS_AFTER_END
        if not waiting or time.monotonic() < self._next_try:
            return
        try:
            self.sending.send()
            self._next_try = time.monotonic() + SECONDS_BETWEEN_SENDS
        except Exception as error:  # whatever a client may raise must not end the work
            self.problem = self.problem or _kept_for_later(self.sending.folder, error)
            self._next_try = time.monotonic() + (
                SECONDS_BETWEEN_SENDS if self.sending.ended else SECONDS_AFTER_FAILURE
            )


def follow(folder: Path, writer: int) -> str | None:
    """Send the run in `folder` while our parent `writer` writes it; give its MLflow id once all is sent."""
    own, stages, warned = Following(folder), Stages(folder), False
    while not own.over:
        if os.getppid() != writer:
            own.sending.end_if_killed()
        stages.step()
        own.step()
        if own.problem is not None and not warned:
            say(own.problem)
            warned = True
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return own.sending.run_id if own.sending.done else None


class Stages:
    """The runs of a pipeline's stages that were left to the sender of the pipeline's own run in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[Path, tuple[Following, Lock]] = {}

    def step(self) -> None:
        """Send what is new of each, and answer those that are over."""
        self._find()
        for folder, (following, lock) in list(self._running.items()):
            if holder(folder / "writer") is None:
                following.sending.end_if_killed()
            following.step()
            if following.over:
                del self._running[folder]
                sent = following.sending.run_id if following.sending.done else None
                answer = {"run_id": sent, "problem": following.problem}
                (folder / LEFT).unlink(missing_ok=True)
                with suppress(OSError):  # on a full disk the stage waits no longer than it would for a server
                    write_json(self._folder / ANSWERS / f"{folder.name}.json", answer)
                lock.release()

    def _find(self) -> None:
        for mark in self._folder.parent.glob(f"[!.]*/{LEFT}"):
            lock = Lock(mark.with_name("sender"))
            if mark.parent not in self._running and _read_text(mark) == self._folder.name and lock.acquire():
                self._running[mark.parent] = Following(mark.parent), lock


def leave(folder: Path, pipeline: Path, writer: int) -> str | None:
    """Leave the run in `folder` to the sender of `pipeline`, and give its MLflow id once all is sent.

    When that sender is gone before it has answered, the run is sent from here.
    """
    (folder / LEFT).write_text(pipeline.name, encoding="ascii")
    answered = pipeline / ANSWERS / f"{folder.name}.json"
    while not answered.exists():
        if holder(pipeline / "sender") is None:
            return _send_alone(folder, writer)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    answer = json.loads(answered.read_text(encoding="utf-8"))
    if answer["problem"] is not None:
        say(answer["problem"])
    return None if answer["run_id"] is None else str(answer["run_id"])


def _send_alone(folder: Path, writer: int) -> str | None:
    """As `follow`, and the runs that were killed before us are ended."""
    if not folder.is_dir():
        return None  # all of it was sent, but who did so is gone
    lock = Lock(folder / "sender")
    lock.acquire()
    (folder / LEFT).unlink(missing_ok=True)
    run_id = follow(folder, writer)
    if run_id is not None and os.getppid() == writer:
        with suppress(Exception):  # `lifecycle upload` would say why
            _end_killed_runs(folder.parent)
    return run_id


def _kept_for_later(folder: Path, error: Exception) -> str:
    return (
        f"warning: the tracking store {address()} does not take the run ({_reason(error)}); "
        f"the work goes on, the run is kept in {folder}, and `lifecycle upload` sends it later"
    )


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom: "Connection refused" rather than the layers above it."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return redact(one_line(error))[:160]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's own log lines and warnings off the terminal."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _main(folder: Path, writer: int) -> None:
    parent = _start_event(folder).get("parent")
    with _quiet():
        if parent is not None and holder(folder.parent / parent / "sender") is not None:
            run_id = leave(folder, folder.parent / parent, writer)
        else:
            run_id = _send_alone(folder, writer)
    if run_id is not None and os.getppid() == writer:
        sys.stdout.write(run_id)
    sys.stdout.flush()
    os._exit(0)  # the client's libraries take most of a second to leave, and the stage waits


def _end_killed_runs(spool: Path) -> None:
    """End the runs whose writers were killed together with their senders."""
    for folder in _waiting(spool):
        sending = Sending(folder)
        sending.look()
        if not sending.ended:
            _finish(folder)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
