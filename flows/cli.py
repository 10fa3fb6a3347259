"""The command `lifecycle`: run, look, verify, upload, ui. `lifecycle COMMAND --help` has examples.

Exit codes: 0 done · 2 wrong use, params or data · 3 a check said no · 75 try again later · 130 interrupted.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from flows.run import Run

INTERRUPTED = 130
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A language model's whole life as one graph: Prefect runs it, DVC versions it, MLflow records it.",
    epilog="Exit codes: 0 done; 2 wrong use, params or data; 3 a check said no; 75 try later; 130 interrupted.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, for scripts.")]


@app.command(
    epilog="Examples:  lifecycle run   |   lifecycle run --preset smoke   |   "
    "lifecycle run --set finetune.method=ia3 --set seed=2   |   lifecycle run --stage evaluate --force"
)
def run(
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", help="Write this into params.yaml first; repeatable."
        ),
    ] = None,
    presets: Annotated[
        list[str] | None,
        typer.Option(
            "--preset", metavar="NAME", help="Merge presets/NAME.yaml into params.yaml first; repeatable."
        ),
    ] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="NAME", help="Only this stage and what it needs; repeatable."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Run the named stages (without --stage: all) though they are up to date."),
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="How many stages may run side by side.")] = 2,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for another run in this workspace to end.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the pipeline up to date, running only what changed."""
    with _workspace() as root:
        from flows import workspace

        with workspace.locked(root, wait):
            code = _run(root, settings or [], presets or [], stages or [], force, jobs, as_json)
    raise typer.Exit(code)


@app.command(epilog="Example:  lifecycle status --json | jq '.stages[] | select(.state != \"up to date\")'")
def status(as_json: AsJson = False) -> None:
    """Say of each stage whether it is up to date, what changed, and whether it runs now."""
    with _workspace() as root:
        from flows import status as found

        report = found.look(root)
        if as_json:
            _write_json({"stages": report})
        else:
            found.show(report)


@app.command(epilog="Example:  lifecycle verify || echo 'see above how to mend it'")
def verify(as_json: AsJson = False) -> None:
    """Hash every file that DVC keeps and every output again, and name those that were damaged."""
    with _workspace() as root:
        from flows import verify as check

        damaged = check.damaged(root)
        if as_json:
            _write_json({"damaged": [fault.as_json() for fault in damaged]})
        else:
            check.show(damaged)
    raise typer.Exit(3 if damaged else 0)


@app.command(epilog="Example:  MLFLOW_TRACKING_URI=https://mlflow.example.org lifecycle upload")
def upload(as_json: AsJson = False) -> None:
    """Send the runs that were kept here, because the MLflow server was away when they ran."""
    with _workspace():
        from tasks.stage import tracking
        from tasks.stage.errors import TryAgain

        done = tracking.upload()
        if as_json:
            _write_json({"sent": done.sent, "kept": done.kept, "problem": done.problem})
        else:
            sys.stdout.write(f"sent {len(done.sent)}, still here {len(done.kept)}\n")
        if done.problem:
            raise TryAgain(done.problem)


@app.command(epilog="Example:  lifecycle ui --mlflow-port 5001")
def ui(
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow UI.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect UI.")] = 4200,
) -> None:
    """Serve the MLflow and Prefect UIs on this machine alone, until Ctrl-C."""
    with _workspace() as root:
        from flows.ui import serve

        serve(root, mlflow_port, prefect_port)


def main() -> None:
    """The entry point of the command."""
    app()


def _run(
    root: Path,
    settings: list[str],
    presets: list[str],
    stages: list[str],
    force: bool,
    jobs: int,
    as_json: bool,
) -> int:
    from flows import pipeline
    from flows.run import plan
    from tasks.stage.errors import say
    from tasks.stage.params import PARAMS_FILE, check_all, read_yaml

    if settings or presets:
        from flows import params_file

        for line in params_file.change(root, presets, settings):
            say(f"params.yaml: {line}")
    for line in pipeline.mend(root):
        say(line)
    read_yaml(PARAMS_FILE)  # its own message for a broken file says more than DVC's
    planned = plan(root, stages, force, jobs)
    if planned.due:
        check_all()
    code = _carry_out(planned, quiet=as_json)
    if as_json:
        from flows.run import as_json as results

        _write_json({"exit_code": code, "title": planned.title, "stages": results(planned)})
    return code


def _carry_out(run: "Run", quiet: bool) -> int:
    from rich.console import Console

    from flows import display, server
    from tasks.stage.errors import say

    recorded = True
    if run.due or server.configured(run.root):
        from flows.execute import execute

        if run.due:
            run.record()
        recorded = execute(run, display.display(run, quiet))
        run.close()
    else:
        run.settle_rest()
        say(f"Everything is up to date: {len(run.stages)} stages, nothing to do.")
    if not quiet:
        display.show_result(run, Console())
    display.show_failures(run, Console(stderr=True))
    if not recorded:
        _leave(run.code)
    return run.code


@contextmanager
def _workspace() -> Iterator[Path]:
    """Work in the root of the repository; turn what goes wrong into one line and an exit code."""
    from flows import workspace
    from tasks.stage.errors import Interrupted, exit_code, say

    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        root = workspace.find(Path.cwd())
        os.chdir(root)
        workspace.prepare(root)
        yield root
    except (KeyboardInterrupt, Interrupted):
        from flows import processes

        processes.kill_all()
        _leave(INTERRUPTED)
    except Exception as error:
        code = exit_code(error)
        if code == 1:
            raise
        for line in str(error).splitlines():
            say(line)
        raise typer.Exit(code) from None


def _interrupt(_number: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _leave(code: int) -> NoReturn:
    """End this process without waiting for Prefect, which still tries to reach its server."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _write_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
