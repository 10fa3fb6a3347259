"""Optuna chooses the params of the next trial: each trial is a point of a sweep.

    .work/sweeps/NAME/optuna.db      the study, for `optuna-dashboard` too

The choice for trial n depends on `seed` of params.yaml, on n and on the trials before, not on when the search
was interrupted. A trial that was cut short goes on with the params it had.
"""

import json
import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flows import grid, sweep
from flows.grid import Range
from flows.sweep import Record, Sweep
from tasks.stage.errors import UserError

FILE = "optuna.db"
STARTUP = 4  # trials that run whole before any is given up
Direction = Literal["max", "min"]


class Search:
    """The trials of a search: a plan of a sweep. `records` grows by each trial that is begun.

    A trial is given up when an early metric is worse than the median of the trials before, once four have
    been whole.
    """

    def __init__(self, root: Path, chosen: Sweep, records: list[Record]) -> None:
        import optuna

        optuna.logging.set_verbosity(logging.ERROR)
        self._optuna, self._root, self._sweep, self._records = optuna, root, chosen, records
        self._ranges = grid.searched(chosen.search)
        self._objective, self._direction = goal(chosen.objective)
        self._early = [goal(each) for each in chosen.early]
        self._seed = sweep.seed(root, chosen)
        self._fixed = {key: values[0] for key, values in map(grid.axis, chosen.settings)}
        self._guard = threading.Lock()
        self._study = optuna.create_study(
            study_name=chosen.name,
            storage=f"sqlite:///{sweep.place(root, chosen.name) / FILE}",
            direction="maximize" if self._direction == "max" else "minimize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
            load_if_exists=True,
        )
        for found in self._study.get_trials(deepcopy=False)[len(records) :]:  # a kill came between the two
            self._begin(optuna.trial.Trial(self._study, found._trial_id))

    def take(self, running: Collection[Record]) -> Record | None:
        """A trial that was cut short, or a new one while there are some left."""
        busy = {record.number for record in running}
        for record in self._records:
            if record.state in ("waiting", "stopped") and record.number not in busy:
                return record
        if len(self._records) >= self._sweep.trials:
            return None
        return self._ask()

    def early_stages(self) -> Sequence[str]:
        return [name.partition(".")[0] for name, _ in self._early]

    def worth_going_on(self, record: Record, step: int, folder: Path) -> bool:
        name, direction = self._early[step]
        value = metric(folder, name)
        with self._guard:
            trial = self._trial(record)
            trial.report(value if direction == self._direction else -value, step)
            if not trial.should_prune():
                return True
            self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)
        record.message = f"{name} = {value:.4g} is worse than the median"
        return False

    def settled(self, record: Record, folder: Path) -> None:
        if record.state == "pruned":
            return
        with self._guard:
            trial = self._trial(record)
            try:
                record.value = metric(folder, self._objective) if record.state == "done" else None
            finally:
                failed = self._optuna.trial.TrialState.FAIL if record.value is None else None
                self._study.tell(trial, record.value, state=failed)

    def _ask(self) -> Record:
        number = len(self._records) + 1
        self._study.sampler = self._optuna.samplers.TPESampler(
            seed=self._seed * 10_007 + number, n_startup_trials=STARTUP, constant_liar=True
        )
        with self._guard:
            return self._begin(self._study.ask())

    def _begin(self, trial: Any) -> Record:
        """Choose the params of a trial, and write it down before it runs."""
        number = trial.number + 1
        chosen = {key: self._suggest(trial, key, within) for key, within in self._ranges.items()}
        settings = {**self._fixed, **chosen}
        record = Record(number, grid.name(number, settings, list(chosen)), settings)
        self._records.append(record)
        sweep.keep(self._root, self._sweep.name, record)
        return record

    def _suggest(self, trial: Any, key: str, within: Range) -> Any:
        if within.choices:
            texts = [json.dumps(choice) for choice in within.choices]  # Optuna keeps plain values alone
            return json.loads(trial.suggest_categorical(key, texts))
        suggest = trial.suggest_int if within.whole else trial.suggest_float
        return suggest(key, within.low, within.high, log=within.log)

    def _trial(self, record: Record) -> Any:
        """Optuna's trial of a record, also of one that an earlier run began."""
        found = self._study.get_trials(deepcopy=False)[record.number - 1]
        return self._optuna.trial.Trial(self._study, found._trial_id)


def check(root: Path, tried: Sweep, stages: Collection[str]) -> None:
    """Raise UserError for a search that cannot work; `stages` are those that run."""
    if not tried.objective:
        raise UserError("a search needs --objective STAGE.KEY (of metrics/STAGE.json)")
    for option, text in (("--objective", tried.objective), *(("--early", each) for each in tried.early)):
        stage = goal(text)[0].partition(".")[0]
        if stage not in stages:
            raise UserError(f"{option} {text}: the stage {stage} does not run; {', '.join(stages)} do")
    for setting in tried.settings:
        if len(grid.axis(setting)[1]) > 1:
            raise UserError(f"--set {setting}: one value, or --search {setting} to choose among them")
    ranges = grid.searched(tried.search)
    for end in (0, -1):
        settings = {
            key: within.choices[end] if within.choices else (within.low, within.high)[end]
            for key, within in ranges.items()
        }
        sweep.check_params(root, tried, settings)


def goal(text: str) -> tuple[str, Direction]:
    """`evaluate.finetune.rougeL` → to be large; `finetune.loss_after:min` → to be small. Raises UserError."""
    name, _, direction = text.partition(":")
    if "." not in name or direction not in ("", "max", "min"):
        raise UserError(f"{text}: expected STAGE.KEY, STAGE.KEY:max or STAGE.KEY:min")
    return name, "min" if direction == "min" else "max"


def metric(folder: Path, name: str) -> float:
    """STAGE.KEY from metrics/STAGE.json in `folder`. Raises UserError when it is no number there."""
    stage, _, key = name.partition(".")
    path = folder / "metrics" / f"{stage}.json"
    value: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name}: metrics/{stage}.json has no such number")
    return float(value)
