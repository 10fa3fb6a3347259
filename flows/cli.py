"""The command `lifecycle`: run, plan, sweep, apply, compare, status, report, chat, score, label, verify,
upload, ui, register, promote, lineage, reproduce, endpoint, serve.

`lifecycle COMMAND --help` has examples.

Exit codes: 0 done · 2 wrong use, params or data · 3 a check said no · 75 try again later · 130 interrupted.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from flows.rankings import Wanted
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
Presets = Annotated[
    list[str] | None,
    typer.Option(
        "--preset", metavar="NAME", help="Merge presets/NAME.yaml into params.yaml first; repeatable."
    ),
]
Stages = Annotated[
    list[str] | None,
    typer.Option("--stage", metavar="NAME", help="Only this stage and what it needs; repeatable."),
]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="A number or an alias.")]


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
    presets: Presets = None,
    stages: Stages = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Run the named stages (without --stage: all) though they are up to date."),
    ] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="First look for newer data and models at their source.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="How many stages may run side by side.")] = 2,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for another run in this workspace to end.")
    ] = False,
    wanted: Annotated[
        int | None,
        typer.Option(
            "--wait-for-rankings", metavar="N", min=1, help="Before `feedback`, until people gave so many."
        ),
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(metavar="2d", help="Wait no longer than this for rankings: 90s, 30m, 12h, 2d.")
    ] = None,
    late: Annotated[
        Literal["stop", "go-on"],
        typer.Option(help="At the deadline: end with 75, or go on with the rankings that are there."),
    ] = "stop",
    as_json: AsJson = False,
) -> None:
    """Bring the pipeline up to date, running only what changed."""
    with _workspace() as root:
        from flows import rankings, workspace
        from tasks.stage.errors import UserError

        if deadline is not None and wanted is None:
            raise UserError("--deadline is for --wait-for-rankings N: say how many to wait for")
        seconds = None if deadline is None else rankings.duration(deadline)
        awaited = None if wanted is None else rankings.Wanted(wanted, seconds, late)
        with workspace.locked(root, wait):
            if refresh:
                _refresh(root)
            code = _run(root, settings or [], presets or [], stages or [], force, jobs, awaited, as_json)
    raise typer.Exit(code)


@app.command(
    epilog="Examples:  lifecycle plan   |   lifecycle plan --stage finetune --memory 16GB   |   "
    "lifecycle plan --preset flan-t5-base --set finetune.method=full   |   "
    "lifecycle plan --memory 80GB --flops 4e14 --devices 8 --strategy fsdp --json"
)
def plan(
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Plan with this; repeatable."),
    ] = None,
    presets: Annotated[
        list[str] | None,
        typer.Option("--preset", metavar="NAME", help="Plan with presets/NAME.yaml; repeatable."),
    ] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="NAME", help="Only this stage; repeatable."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Of a device, such as 16GB; else what is found here."),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(
            "--flops", metavar="NUMBER", help="Operations a second that training reaches; else measured here."
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="How many share the work; else compute.processes.")
    ] = None,
    strategy: Annotated[
        Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] | None,
        typer.Option("--strategy", help="What devices divide among them; else as compute.accelerate."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate memory and time of the stages before they run; exit with 3 when one cannot fit.

    Nothing runs, and nothing is written: --set and --preset are tried on params.yaml, which stays as it is.
    """
    with _workspace() as root:
        from flows import plan as ahead
        from tasks.stage.errors import UserError

        if flops is not None and not 0 < flops < float("inf"):
            raise UserError(f"--flops {flops}: expected a number of operations a second, such as 5e10")
        found = ahead.look(root, stages or [], memory, flops, devices, strategy, presets or [], settings or [])
        if as_json:
            _write_json(found)
        else:
            ahead.show(found)
        ahead.refuse(found)


@app.command(
    epilog="Examples:  lifecycle sweep --set finetune.method=full,lora --set ppo.kl.beta=0.05,0.2   |   "
    "lifecycle sweep --set 'finetune.tasks=[summarize],[summarize,act],null' --stage evaluate --jobs 2   |   "
    "lifecycle sweep --search finetune.lora.learning_rate=0.0005..0.01:log --search finetune.lora.r=4,8,16 "
    "--trials 20 --objective evaluate.finetune.rougeL --early finetune.loss_after:min   |   "
    "lifecycle sweep --continue method-beta-1a2b3c   |   lifecycle sweep --list",
)
def sweep(
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE,VALUE",
            help="A dimension of the grid; repeatable. Values are YAML with commas between them: a list or "
            "mapping keeps its brackets ([a, b]), text with a comma its quotes. One value: for all points.",
        ),
    ] = None,
    presets: Presets = None,
    stages: Stages = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            "--search",
            metavar="SECTION.KEY=LOW..HIGH",
            help="Let Optuna choose this param; repeatable. LOW..HIGH:log draws small and large alike; whole "
            "ends mean whole numbers; VALUE,VALUE are choices.",
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            "--objective", metavar="STAGE.KEY", help="Of metrics/STAGE.json, to be large; STAGE.KEY:min, small."
        ),
    ] = "",
    trials: Annotated[int, typer.Option(min=1, help="How many trials a search has, all in all.")] = 20,
    early: Annotated[
        list[str] | None,
        typer.Option(
            "--early",
            metavar="STAGE.KEY",
            help="Run this stage first, and give up a trial whose metric is worse than the median; repeatable. "
            "STAGE.KEY:min wants it small.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many points run side by side.")] = 1,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="A name; else one is made.")] = "",
    go_on: Annotated[
        str, typer.Option("--continue", metavar="NAME", help="Go on with what is missing of this sweep.")
    ] = "",
    shown: Annotated[
        list[str] | None,
        typer.Option("--show", metavar="STAGE.KEY", help="This metric in the table; repeatable."),
    ] = None,
    keep_trees: Annotated[
        bool, typer.Option("--keep", help="Leave the work trees of points that are done.")
    ] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Say which sweeps there are, and run nothing.")
    ] = False,
    removed: Annotated[
        str, typer.Option("--remove", metavar="NAME", help="Forget this sweep, and run nothing.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Run variants of the pipeline, each in a git work tree of its own, on the workspace as it is now.

    Uncommitted changes come along. A stage that is equal in two points runs once. The same command goes on with
    what is missing. `lifecycle apply NAME/POINT` brings one into the workspace, `lifecycle compare NAME` shows
    them side by side.
    """
    with _workspace() as root:
        from flows import sweep_command

        tried = sweep_command.Tried(
            settings=tuple(settings or ()),
            presets=tuple(presets or ()),
            stages=tuple(stages or ()),
            search=tuple(search or ()),
            objective=objective,
            early=tuple(early or ()),
            trials=trials,
        )
        if listed:
            found = sweep_command.listed(root)
            if as_json:
                _write_json({"sweeps": found})
            else:
                sweep_command.show_listed(found)
            code = 0
        elif removed:
            sweep_command.remove(root, removed)
            code = 0
        else:
            result = sweep_command.run(root, tried, name, go_on, jobs, shown or [], keep_trees, as_json)
            if as_json:
                _write_json(result)
            code = int(result["exit_code"])
    raise typer.Exit(code)


@app.command(epilog="Example:  lifecycle apply method-beta-1a2b3c/3 && git diff --stat")
def apply(
    wanted: Annotated[str, typer.Argument(metavar="NAME/POINT", help="A sweep and a number or name in it.")],
    force: Annotated[
        bool, typer.Option("--force", help="Though params.yaml or outputs here are kept nowhere else.")
    ] = False,
) -> None:
    """Bring a point of a sweep into the workspace: params, dvc.lock, metrics, reports and outputs."""
    with _workspace() as root:
        from flows import sweep_command, workspace

        with workspace.locked(root):
            sweep_command.apply(root, wanted, force)


@app.command(
    epilog="Examples:  lifecycle compare method-beta-1a2b3c   |   lifecycle compare HEAD~1 .   |   "
    "lifecycle compare champion method-beta-1a2b3c/3 3f2a9c   |   lifecycle compare main . --metric '*.rougeL'"
)
def compare(
    wanted: Annotated[
        list[str],
        typer.Argument(
            metavar="A B ...",
            help="Each a sweep (NAME, all its points), a point (NAME/POINT), a git revision, the MLflow id of "
            "a pipeline's run or its beginning, a registered version (number, alias, models:NAME/VERSION), or "
            ". for the workspace. sweep:, git:, run: or models: in front says which is meant.",
        ),
    ],
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="STAGE.KEY", help="Show this metric; * fits anything; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what differs: params, metrics with intervals, and which differences are real."""
    with _workspace() as root:
        from flows import compare_command

        found = compare_command.run(root, wanted, metrics or [], quiet=as_json)
        if as_json:
            _write_json(found)


@app.command(
    epilog="Examples:  lifecycle status --watch   |   "
    "lifecycle status --json | jq '.stages[] | select(.state != \"up to date\")'"
)
def status(
    watch: Annotated[
        bool, typer.Option("--watch", help="Until Ctrl-C, anew at each change; with --json a line for each.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say of each stage whether it is up to date, what changed, and whether it runs now."""
    with _workspace() as root:
        from flows import status as found

        if watch:
            found.watch(root, as_json)
            return
        report = found.look(root)
        if as_json:
            _write_json({"stages": report})
        else:
            found.show(report)


@app.command(epilog="Example:  lifecycle report && xdg-open reports/lifecycle.html")
def report() -> None:
    """Write reports/lifecycle.html: the whole pipeline, its numbers and samples, as one page to look at."""
    with _workspace() as root:
        from flows import page

        sys.stdout.write(f"{page.write(root).relative_to(root)}\n")


@app.command(
    epilog="Examples:  lifecycle chat   |   lifecycle chat --version champion   |   "
    "LIFECYCLE_PASSWORD=... lifecycle chat --host 0.0.0.0"
)
def chat(
    versions: Annotated[
        list[str] | None,
        typer.Option("--version", metavar="VERSION", help="A registered version too; repeatable."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; other than this machine alone needs LIFECYCLE_PASSWORD.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
) -> None:
    """Try the models on a page: side by side, every decoding setting, the probabilities of each token."""
    with _workspace() as root:
        from flows.chat import chat as serve_page

        serve_page(root, versions or [], host, port)


@app.command(
    epilog="Examples:  lifecycle score ppo --input prompts.jsonl --output answers.jsonl   |   "
    "lifecycle score ppo --input prompts.jsonl --output answers.jsonl --set num_beams=4   |   "
    "lifecycle score models/ppo --input prompts.jsonl.gz --output answers.jsonl --ray 10.0.0.7:6379"
)
def score(
    wanted: Annotated[
        str, typer.Argument(metavar="VARIANT", help="Of evaluate.variants, or a model's folder.")
    ],
    source: Annotated[
        Path, typer.Option("--input", metavar="FILE", help="JSON lines, each with a column prompt.")
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="The same rows with answer, toxicity and reward.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Of GenerationConfig, in place of what evaluate.generation says; repeatable.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of sampling; else that of params.yaml.")] = None,
    part_rows: Annotated[
        int, typer.Option(min=1, help="Rows that are answered, and kept on the disk, together.")
    ] = 512,
    ray: Annotated[
        str, typer.Option("--ray", metavar="ADDRESS", help="A Ray cluster: local, auto, [ray://]HOST:PORT.")
    ] = "",
) -> None:
    """Answer a file of prompts and score the answers, here or on a Ray cluster; goes on where it stopped."""
    source, output = source.resolve(), output.resolve()
    with _workspace() as root:
        from flows.score import score as answer

        rows = answer(root, wanted, settings or [], seed, source, output, part_rows, ray or None)
        sys.stdout.write(f"{rows} rows in {output}\n")


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


@app.command(
    epilog="Examples:  lifecycle label   |   lifecycle label --variant finetune --variant ppo --labeler ann   "
    "|   lifecycle label --variant ppo --samples 4 --new   |   lifecycle label --report"
)
def label(
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant", metavar="NAME", help="Whose answers, of evaluate.variants; repeatable. Else all."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Answers of each variant; else 1, or 4 of a single one.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Of sampling; 0: as the evaluation answers. Else 1.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the prompts; else evaluate.task.")
    ] = None,
    split: Annotated[
        Literal["train", "validation"] | None, typer.Option(help="Where prompts are taken from; else train.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="How many are drawn; else 50.")] = None,
    new: Annotated[
        bool, typer.Option("--new", help="Put other prompts and answers on the page; what was ranked stays.")
    ] = False,
    overlap: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the prompts that every labeler gets.")
    ] = 0.2,
    labeler: Annotated[str, typer.Option(metavar="NAME", help="Who ranks; else the page asks.")] = "",
    host: Annotated[
        str, typer.Option(help="Other than this machine alone needs a password in LIFECYCLE_PASSWORD.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the page.")] = 7861,
    report: Annotated[
        bool, typer.Option("--report", help="Show who ranked how much and how far labelers agree, no page.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Rank answers in the browser, blind; every ranking is saved at once, and `feedback` can read them."""
    with _workspace() as root:
        from flows import label as desk

        if report or as_json:
            found = desk.report(root)
            if as_json:
                _write_json(found)
            else:
                desk.show(found)
        else:
            wishes = desk.Wishes(variants, samples, temperature, task, split, prompts)
            desk.label(root, wishes, new, overlap, labeler, host, port)


@app.command(
    epilog="Examples:  lifecycle register   |   lifecycle register finetune --adapter separate",
)
def register(
    variant: Annotated[
        str | None, typer.Argument(metavar="[VARIANT]", help="Of the evaluation; else register.variant.")
    ] = None,
    adapter: Annotated[
        Literal["merged", "separate"] | None,
        typer.Option("--adapter", help="Merge an adapter, or keep it beside its base; else register.adapter."),
    ] = None,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Also with uncommitted changes; the version says so.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put an evaluated variant into the model registry, as the challenger."""
    with _workspace() as root:
        from flows import workspace
        from flows.register import register as add

        with workspace.locked(root):
            version = add(root, variant, adapter, allow_dirty)
        if as_json:
            _write_json({"name": version.name, "version": version.number, "aliases": list(version.aliases)})
        else:
            sys.stdout.write(f"{version.name} version {version.number} is the challenger\n")


@app.command(epilog="Examples:  lifecycle promote   |   lifecycle promote 7 --json")
def promote(version: Version = "challenger", as_json: AsJson = False) -> None:
    """Make a version the champion if it passes every gate; else change nothing and exit with 3."""
    with _workspace() as root:
        from flows import notify, workspace
        from flows import promote as gate
        from tasks.stage.errors import GateRefused

        with workspace.locked(root):  # a stage that runs meanwhile would spoil the timing
            ours, champion, found = gate.judge(version)
            if as_json:
                verdicts = [verdict.as_json() for verdict in found]
                _write_json({"version": ours.number, "over": champion and champion.number, "gates": verdicts})
            else:
                gate.show(ours, champion, found)
            try:
                gate.promote(ours, champion, found)
            except GateRefused as refusal:
                notify.send(notify.Message("gate", str(refusal)))
                raise


@app.command(epilog="Example:  lifecycle lineage champion")
def lineage(version: Version, as_json: AsJson = False) -> None:
    """Say what a registered version was made from, and the commands that make it again."""
    with _workspace():
        from flows import lineage as origin

        found, known = origin.look(version)
        if as_json:
            _write_json({**known, "version": found.number, "rebuild": origin.commands(found.number, known)})
        else:
            origin.show(found.number, found.aliases, known)


@app.command(epilog="Example:  lifecycle reproduce champion || echo 'not the same bytes'")
def reproduce(
    version: Version,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the folder in which it was made again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a registered version again from its commit, in a clean folder, and compare every hash."""
    with _workspace() as root:
        from flows import lineage as origin

        found, known = origin.look(version)
        compared = origin.reproduce(root, found.number, known, keep)
        if as_json:
            _write_json({"version": found.number, "outputs": [entry.as_json() for entry in compared]})
        else:
            origin.show_compared(compared)
    raise typer.Exit(0 if all(entry.same for entry in compared) else 3)


@app.command(
    epilog="Example:  lifecycle endpoint champion --port 5002   |   curl -H 'Content-Type: application/json' "
    '-d \'{"inputs": [{"prompt": "...", "max_new_tokens": 40}]}\' 127.0.0.1:5002/invocations'
)
def endpoint(
    version: Version = "champion",
    port: Annotated[int, typer.Option(help="Port of the service.")] = 5002,
) -> None:
    """Serve a registered version on this machine alone, until Ctrl-C."""
    with _workspace() as root:
        from flows.endpoint import answer

        answer(root, version, port)


@app.command(
    epilog="Examples:  lifecycle serve --cron '0 3 * * *' --timezone Europe/Berlin   |   "
    "lifecycle serve --interval 6h --overlap skip   |   lifecycle serve --deployment evaluation --interval 1d"
)
def serve(
    cron: Annotated[str | None, typer.Option(help="When to run: minute hour day month weekday.")] = None,
    interval: Annotated[str | None, typer.Option(help="How often to run: 30m, 6h, 1d.")] = None,
    timezone: Annotated[str, typer.Option(help="Of the cron line.")] = "UTC",
    deployment: Annotated[str, typer.Option(help="Which of prefect.yaml the schedule is for.")] = "lifecycle",
    overlap: Annotated[
        Literal["wait", "skip"], typer.Option(help="What a run does while another one has the workspace.")
    ] = "wait",
    port: Annotated[int, typer.Option(help="Of the Prefect server, unless one is configured.")] = 4200,
) -> None:
    """Run the pipeline on a schedule, or when asked in Prefect's UI, until Ctrl-C."""
    with _workspace() as root:
        from flows.serve import serve as keep_running

        keep_running(root, deployment, cron, interval, timezone, overlap, port)


def main() -> None:
    """The entry point of the command."""
    app()


def _refresh(root: Path) -> None:
    from flows.refresh import refresh
    from tasks.stage.errors import say

    for line in refresh(root):
        say(line)


def _run(
    root: Path,
    settings: list[str],
    presets: list[str],
    stages: list[str],
    force: bool,
    jobs: int,
    wanted: "Wanted | None",
    as_json: bool,
) -> int:
    from flows.run import ready

    planned = ready(root, settings, presets, stages, force, jobs, wanted=wanted)
    code = _carry_out(planned, quiet=as_json)
    if as_json:
        from flows.run import as_json as results

        _write_json({"exit_code": code, "title": planned.title, "stages": results(planned)})
    return code


def _carry_out(run: "Run", quiet: bool) -> int:
    from rich.console import Console

    from flows import closing, display, server
    from tasks.stage.errors import say

    recorded = True
    if run.due or server.configured(run.root):
        from flows.execute import execute

        if run.due:
            run.record()
        recorded = execute(run, display.display(run, quiet))
    else:
        run.settle_rest()
        say(f"Everything is up to date: {len(run.stages)} stages, nothing to do.")
    page = closing.close(run)
    if not quiet:
        display.show_result(run, Console())
    display.show_failures(run, Console(stderr=True))
    if page is not None and not quiet:
        sys.stdout.write(f"\nto look at: {page.relative_to(run.root)}\n")
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
