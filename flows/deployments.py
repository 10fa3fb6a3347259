"""What `lifecycle serve` tells Prefect: the deployments of prefect.yaml, a schedule, and when a run is lost."""

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import (
    ConcurrencyLimitConfig,
    ConcurrencyLimitStrategy,
    StateType,
)
from prefect.deployments.runner import RunnerDeployment
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.runner import Runner
from prefect.schedules import Cron, Interval, Schedule
from prefect.types.entrypoint import EntrypointType

from flows.scheduled import scheduled
from tasks.stage.errors import UserError, one_line

FILE = Path("prefect.yaml")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_HEARTBEATS = 30
HEARTBEATS_TO_MISS = 3
LOST = "lifecycle: mark lost runs as crashed"
STRATEGIES = {"wait": ConcurrencyLimitStrategy.ENQUEUE, "skip": ConcurrencyLimitStrategy.CANCEL_NEW}


def schedule(cron: str | None, interval: str | None, timezone: str) -> Schedule | None:
    """A schedule as it is written on the command line; None when neither is given.

    Raises UserError for what is none.
    """
    if cron is not None and interval is not None:
        raise UserError("--cron and --interval: choose one")
    try:
        if cron is not None:
            return Cron(cron, timezone=timezone)
        return None if interval is None else Interval(_length(interval), timezone=timezone)
    except ValueError as error:
        reason = one_line(error)
        raise UserError(
            f'no schedule: {reason}; expected --cron "0 3 * * *" or --interval 6h, and --timezone Europe/Berlin'
        ) from None


def read(
    root: Path, name: str, planned: Schedule | None, overlap: Literal["wait", "skip"]
) -> list[RunnerDeployment]:
    """The deployments of prefect.yaml, the one called `name` with the schedule.

    Raises UserError when the file is wrong or has no such deployment.
    """
    entries = _entries(root)
    if name not in [entry["name"] for entry in entries]:
        raise UserError(f"--deployment {name}: {FILE} has {', '.join(entry['name'] for entry in entries)}")
    return [
        cast("Any", scheduled).to_deployment(  # async or not, as it is called
            name=entry["name"],
            description=entry.get("description"),
            parameters={**entry.get("parameters", {}), "overlap": overlap},
            schedules=[planned] if planned is not None and entry["name"] == name else [],
            paused=False,
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=STRATEGIES[overlap]),
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        for entry in entries
    ]


def register(served: Sequence[RunnerDeployment]) -> None:
    """Tell the server of the deployments, and to mark runs as crashed whose heartbeats have ended."""
    for deployment in served:
        deployment.apply()
    automation = lost_runs()
    with get_client(sync_client=True) as client:
        found = client.read_automations_by_name(LOST)
        if not found:
            client.create_automation(automation)


def serve(served: Sequence[RunnerDeployment]) -> None:
    """Start the runs that are due, until the server has been away for minutes; then RuntimeError.

    KeyboardInterrupt cancels the runs that go on, pauses the schedules, and is raised again.
    """
    runner = Runner(name="lifecycle", heartbeat_seconds=SECONDS_BETWEEN_HEARTBEATS)
    for deployment in served:
        runner.add_deployment(deployment)
    loop = asyncio.new_event_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="runner") as thread:  # signals stay with this one
        ended = thread.submit(loop.run_until_complete, runner.start())
        try:
            while not ended.done():
                wait([ended], SECONDS_BETWEEN_LOOKS)
        except KeyboardInterrupt:
            asyncio.run_coroutine_threadsafe(runner.astop(), loop).result()
            raise
    ended.result()


def lost_runs() -> AutomationCore:
    """Mark a run as crashed when it has said nothing for a while and has not ended: its machine went down."""
    ends = ("Completed", "Skipped", "Failed", "Cancelled", "Crashed")
    return AutomationCore(
        name=LOST,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in ends)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SECONDS_BETWEEN_HEARTBEATS * HEARTBEATS_TO_MISS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, name="Crashed", message="its heartbeats have ended", force=False
            )
        ],
    )


def _length(text: str) -> timedelta:
    """`6h` as a length of time. Raises ValueError."""
    if not (found := re.fullmatch(r"([1-9][0-9]*)([smhd])", text)):
        raise ValueError(f"{text} is no length of time")
    return timedelta(**{UNITS[found[2]]: int(found[1])})


def _entries(root: Path) -> list[dict[str, Any]]:
    path = root / FILE
    if not path.is_file():
        raise UserError(f"no {FILE} here: it names the deployments that are served")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]
        assert all(isinstance(entry["name"], str) for entry in found)
    except (yaml.YAMLError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{FILE}: expected a list `deployments` with names ({one_line(error)})") from None
    return cast("list[dict[str, Any]]", found)
