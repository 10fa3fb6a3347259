"""What `lifecycle serve` tells Prefect: the deployments of prefect.yaml, a schedule, and when a run is lost."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, Literal, cast

import httpx
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

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_OF_SILENCE = 600.0  # three of Prefect's heartbeats, and some
LOST = "lifecycle: mark lost runs as crashed"
STRATEGIES = {"wait": ConcurrencyLimitStrategy.ENQUEUE, "skip": ConcurrencyLimitStrategy.CANCEL_NEW}


class Away(Exception):  # noqa: N818 - an outage, which passes
    """The Prefect server does not answer."""


def schedule(cron: str | None, interval: timedelta | None, timezone: str) -> Schedule | None:
    """A schedule; None when neither is given. Raises UserError for a cron line or time zone that is none."""
    try:
        if cron is not None:
            return Cron(cron, timezone=timezone)
        return None if interval is None else Interval(interval, timezone=timezone)
    except ValueError as error:
        reason = one_line(error)
        raise UserError(
            f'no schedule: {reason}; expected --cron "0 3 * * *", and --timezone Europe/Berlin'
        ) from None


def build(
    entries: Mapping[str, Mapping[str, Any]],
    name: str,
    planned: Schedule | None,
    overlap: Literal["wait", "skip"],
) -> list[RunnerDeployment]:
    """The deployments that prefect.yaml describes in `entries`, the one called `name` with the schedule."""
    return [
        cast("Any", scheduled).to_deployment(  # async or not, as it is called
            name=each,
            description=entry.get("description"),
            parameters={**(entry.get("parameters") or {}), "overlap": overlap},
            schedules=[planned] if planned is not None and each == name else [],
            paused=False,
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=STRATEGIES[overlap]),
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        for each, entry in entries.items()
    ]


def register(served: Sequence[RunnerDeployment]) -> Runner:
    """Tell the server of the deployments, and to mark lost runs as crashed; gives what starts the runs.

    Raises Away.
    """
    runner = Runner(name="lifecycle")
    try:
        for deployment in served:
            runner.add_deployment(deployment)
        with get_client(sync_client=True) as client:
            if not client.read_automations_by_name(LOST):
                client.create_automation(lost_runs())
    except httpx.TransportError as error:
        raise Away(one_line(error)) from error
    return runner


def start_what_is_due(runner: Runner) -> None:
    """Start the runs that are due, for ever; raises Away when the server does not answer for some time.

    KeyboardInterrupt cancels the runs that go on, pauses the schedules, and is raised again.
    """
    loop = asyncio.new_event_loop()
    with ThreadPoolExecutor(1, thread_name_prefix="runner") as thread:  # signals stay with this one
        ended = thread.submit(loop.run_until_complete, runner.start())
        try:
            while not ended.done():
                wait([ended], SECONDS_BETWEEN_LOOKS)
        except KeyboardInterrupt:
            while not (runner.started or ended.done()):
                wait([ended], SECONDS_BETWEEN_LOOKS)
            if not ended.done():
                asyncio.run_coroutine_threadsafe(runner.astop(), loop).result()
            raise
    try:
        ended.result()
    except Exception as error:  # of several kinds, in groups: it ends by itself for no other reason
        raise Away(one_line(error)) from error


def lost_runs() -> AutomationCore:
    """Mark a scheduled run as crashed when it has said nothing for a while and has not ended: its machine, or
    whoever started it, went down."""
    ends = ("Completed", "Skipped", "Failed", "Cancelled", "Crashed")
    return AutomationCore(
        name=LOST,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in ends)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": scheduled.name},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SECONDS_OF_SILENCE),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, name="Crashed", message="its heartbeats have ended", force=False
            )
        ],
    )
