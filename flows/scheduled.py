"""The flow that deployments run, on a schedule or by hand: prefect.yaml names it, `lifecycle serve` serves it.

Its parameters are what Prefect's form shows and checks. It works in the folder in which it is started, the root
of the repository, and shares the workspace with whoever runs `lifecycle run` there.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from prefect import flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.states import Completed, Failed
from pydantic import Field

from flows import closing, notify, workspace
from flows.lifecycle import settle_all
from flows.refresh import refresh as look_for_news
from flows.run import ready
from tasks.stage.errors import GateRefused, TryAgain, UserError, say
from tasks.stage.params import GRAPH_FILE

Overlap = Literal["wait", "skip"]


def stage_names() -> list[str]:
    """The stages of dvc.yaml, which Prefect's form offers; what is wrong with the file is told by a run."""
    graph = yaml.safe_load((workspace.find(Path.cwd()) / GRAPH_FILE).read_text(encoding="utf-8"))
    return list(graph["stages"])


StageName = Annotated[str, Field(json_schema_extra={"enum": [*stage_names()]})]
Setting = Annotated[str, Field(pattern=r"^[^.=\s]+(\.[^.=\s]+)*=")]


def tell_of_crash(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Tell the webhook of a run of `flow` whose process was killed."""
    text = f"{flow.name} {flow_run.name} crashed: {state.message}"
    notify.send(notify.Message("crash", text, {"title": flow_run.name, "flow_run": str(flow_run.id)}))


@flow(name="scheduled-lifecycle", persist_result=False, on_crashed=[tell_of_crash])
def scheduled(
    stages: tuple[StageName, ...] = (),
    alone: bool = False,
    force: bool = False,
    refresh: bool = False,
    settings: tuple[Setting, ...] = (),
    overlap: Overlap = "wait",
) -> State[None]:
    """Bring the pipeline up to date, running only what changed.

    Args:
        stages: Only these stages, and what they need. None named: all.
        alone: Run the named stages without what they need, on what is there.
        force: Run the named stages though they are up to date.
        refresh: First look for newer data and models: imports of DVC, and branches of the hub.
        settings: SECTION.KEY=VALUE, written into params.yaml first.
        overlap: While another run has the workspace: wait for it, or skip this one.
    """
    root = workspace.find(Path.cwd())
    workspace.prepare(root)
    try:
        with workspace.locked(root, wait=overlap == "wait"):
            return _bring_up_to_date(root, stages, alone, force, refresh, settings)
    except workspace.Busy as busy:
        return Completed(name="Skipped", message=str(busy))
    except (UserError, GateRefused, TryAgain) as refusal:
        notify.send(notify.Message("failure", str(refusal)))
        return Failed(message=str(refusal))


def _bring_up_to_date(
    root: Path, stages: tuple[str, ...], alone: bool, force: bool, refresh: bool, settings: tuple[str, ...]
) -> State[None]:
    if refresh:
        for line in look_for_news(root):
            say(line)
    run = ready(root, settings, (), stages, force, alone=alone)
    if run.due:
        run.record()
    try:
        return settle_all(run)
    finally:
        run.settle_rest()  # without Prefect, should it be away; nothing otherwise
        closing.close(run)
