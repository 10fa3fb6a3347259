"""What `lifecycle serve` tells Prefect: the deployments of prefect.yaml, a schedule, and when a run is lost."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, Literal, cast

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
SECONDS_BETWEEN_HEARTBEATS = 30
HEARTBEATS_TO_MISS = 3
LOST = "lifecycle: mark lost runs as crashed"
STRATEGIES = {"wait": ConcurrencyLimitStrategy.ENQUEUE, "skip": ConcurrencyLimitStrategy.CANCEL_NEW}


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
            parameters={**entry.get("parameters", {}), "overlap": overlap},
            schedules=[planned] if planned is not None and each == name else [],
            paused=False,
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=STRATEGIES[overlap]),
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        for each, entry in entries.items()
    ]


def register(served: Sequence[RunnerDeployment]) -> Runner:
    """Tell the server of the deployments, and to mark runs as crashed whose heartbeats have ended."""
    runner = Runner(name="lifecycle", heartbeat_seconds=SECONDS_BETWEEN_HEARTBEATS)
    for deployment in served:
        runner.add_deployment(deployment)
    with get_client(sync_client=True) as client:
        if not client.read_automations_by_name(LOST):
            client.create_automation(lost_runs())
    return runner


def start_what_is_due(runner: Runner) -> None:
    """Start the runs that are due, until the server has been away for minutes; then RuntimeError.

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
