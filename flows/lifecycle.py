"""The flow `lifecycle`: the graph of dvc.yaml as Prefect tasks.

One task per stage, named after it, waits for its parents; stages with no path between them run side by side.
DVC alone decides what is up to date, so Prefect caches and keeps nothing. A stage that fails stops what depends
on it and nothing else.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast
from uuid import UUID

from prefect import flow, get_client, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.events.worker import EventsWorker
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed, Paused, Running
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import Task

from flows.pipeline import StageError
from flows.report import as_markdown, as_rows
from flows.run import INTERRUPTED, Run

SECONDS_TO_SEND = 10.0
SECONDS_BETWEEN_LOOKS = 2.0


def worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Crashes and "try again later" are; wrong params, wrong data and a gate's refusal are not."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageError) and error.worth_retrying


@task(cache_policy=NO_CACHE, persist_result=False)
def settle(run: Run, name: str) -> State[None]:
    """Bring one stage up to date."""
    result = run.settle(name)
    return Completed(name=result.state.capitalize(), message=f"{result.seconds:.1f} s")


@flow(name="lifecycle", persist_result=False, validate_parameters=False)
def lifecycle(run: Run) -> State[None]:
    """Bring every stage of `run` up to date."""
    return settle_all(run)


def settle_all(run: Run) -> State[None]:
    """What a flow of ours does: a task for each stage, then the artifacts; gives the flow's last state.

    When the flow is being stopped, the stages save their checkpoints first; when Prefect itself fails, the
    stages that run end as they would have.
    """
    run.flow_run_id, run.flow_run_url = str(flow_run.id), str(flow_run.ui_url or "")
    run.pause = lambda message: paused(run.flow_run_id, message)
    futures: dict[str, PrefectFuture[Any]] = {}
    try:
        for stage in run.stages.values():
            stage_task = settle.with_options(
                name=stage.name,
                task_run_name=stage.name,
                retries=stage.meta.retries,
                retry_delay_seconds=stage.meta.retry_delay,
                retry_condition_fn=worth_retrying,
            )
            parents = [futures[parent] for parent in stage.parents if parent in futures]
            futures[stage.name] = stage_task.submit(run, stage.name, return_state=False, wait_for=parents)
        wait(list(futures.values()))
    except BaseException as error:
        if not isinstance(error, Exception):
            run.stop.set()
        for future in futures.values():
            with suppress(Exception):
                future.wait()
        raise
    create_table_artifact(as_rows(run), key="stages", description="What became of each stage")
    create_markdown_artifact(as_markdown(run), key="summary", description="The run in short")
    return _end(run)


@contextmanager
def paused(run_id: str, message: str) -> Iterator[Callable[[], bool]]:
    """Show a flow run as paused while the block runs; gives a function: has somebody resumed it in the UI?

    A server that does not answer stops nobody from waiting.
    """
    looked = time.monotonic()
    with get_client(sync_client=True) as client:

        def resumed() -> bool:
            nonlocal looked
            if time.monotonic() < looked + SECONDS_BETWEEN_LOOKS:
                return False
            looked = time.monotonic()
            with suppress(Exception):
                state = client.read_flow_run(UUID(run_id)).state
                return state is not None and not state.is_paused()
            return False

        with suppress(Exception):
            client.set_flow_run_state(run_id, Paused(message=message), force=True)
        try:
            yield resumed
        finally:
            with suppress(Exception):
                client.set_flow_run_state(run_id, Running(), force=True)


def start(run: Run) -> None:
    """Run the flow in this thread; its name says what runs.

    Tasks that wait for their parents occupy a thread, so there is one for each; `run` limits how many work.
    """
    runner = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner[Any](max_workers=len(run.stages)))
    lifecycle.with_options(flow_run_name=run.title, task_runner=runner)(run, return_state=True)
    EventsWorker.drain_all(timeout=SECONDS_TO_SEND)  # what became of the tasks is still on its way


def _end(run: Run) -> State[None]:
    if run.code == 0:
        up_to_date = "" if run.due else f": {len(run.stages)} stages are up to date"
        return Completed(message=f"{run.title}{up_to_date}")
    if run.code == INTERRUPTED:
        return Cancelled(message="stopped by the user")
    failed = [result.stage for result in run.results.values() if result.state == "failed"]
    return Failed(message=f"failed: {', '.join(failed)}")
