"""The course of a PPO run: its steps, the looks between them, what the guard does about them, and
checkpoints.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from tasks.data.records import Example
from tasks.metrics.toxicity import Scorer
from tasks.rlhf.assess import Held, health
from tasks.rlhf.guard import Guard
from tasks.rlhf.settings import Watch
from tasks.rlhf.trainer import Ppo
from tasks.stage import Context, checkpoints
from tasks.stage.errors import say

TENSORS, RECORD = "state.safetensors", "course.json"
KEPT_CHECKPOINTS = 2


class Course:
    """A PPO run that can be interrupted after any step.

    Attributes:
        steps_done: how many steps were taken.
        curve: one row a step, of what `Ppo.step` saw.
        looks: one row a look at the held-out prompts.
        answers: the answers to the first of those prompts, at every look.
        events: what the guard did, and why.
        stopped_because: empty while there are steps to take.
    """

    def __init__(self, ppo: Ppo, guard: Guard, held: Held, toxicity: Scorer, watch: Watch, shown: int) -> None:
        self.ppo, self.held = ppo, held
        self.steps_done = 0
        self.curve: list[dict[str, float]] = []
        self.looks: list[dict[str, float]] = []
        self.answers: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.stopped_because = ""
        self._guard, self._toxicity, self._watch, self._shown = guard, toxicity, watch, shown
        self._best = ppo.state()

    def run(
        self,
        steps: int,
        examples: Sequence[Example],
        prompts: Sequence[Sequence[int]],
        checkpoint_every: int,
        context: Context,
    ) -> None:
        """Take the steps that are left, or those until the guard stops; save on request and leave."""
        episodes, answers = self.ppo.rollouts.episodes, self.ppo.rollouts.answers
        with context.progress(steps, f"{context.name}: steps") as bar, context.save_on_stop():
            bar.resume(self.steps_done)
            if self.steps_done == 0:
                self.look(context)
            while self.steps_done < steps and not self.stopped_because:
                rows = rows_of_step(self.steps_done, episodes, answers, len(examples), context.seed)
                began = time.perf_counter()
                seen = self.ppo.step(
                    self.steps_done, [examples[row] for row in rows], [prompts[row] for row in rows]
                )
                speed = episodes / (time.perf_counter() - began)
                self.steps_done += 1
                self.curve.append({"step": self.steps_done, **seen})
                context.track.metrics(seen | {"episodes_per_second": speed}, step=self.steps_done)
                bar.advance(reward=seen["reward"], kl=seen["kl"])
                if self.steps_done % self._watch.every == 0 or self.steps_done == steps:
                    self.look(context)
                stopping = context.stopping
                if (self.steps_done % checkpoint_every == 0 or stopping) and context.place.rank == 0:
                    self.save(context.work)
                if stopping:
                    return
        self.stopped_because = self.stopped_because or "all steps were taken"

    def look(self, context: Context) -> None:
        """Look at the held-out prompts, and do what the guard says."""
        seen, answers = health(
            self.ppo.policy,
            self.ppo.reward,
            self._toxicity,
            self.held,
            self.ppo.rollouts,
            self.steps_done,
            context.place,
        )
        row = {
            "step": seen.step,
            "reward": seen.proxy,
            "gold": sum(seen.gold) / len(seen.gold),
            "toxicity": sum(seen.toxicity) / len(seen.toxicity),
            "kl": seen.kl,
            "response_tokens": seen.length,
            "distinct_2": seen.distinct_2,
        }
        self.looks.append(row)
        context.track.metrics(
            {f"held_out_{name}": value for name, value in row.items() if name != "step"}, seen.step
        )
        shown = [
            {"step": seen.step, "prompt": example.prompt, "answer": answer, "gold": score}
            for example, answer, score in zip(self.held.examples, answers, seen.gold, strict=True)
        ][: self._shown]
        self.answers += shown
        context.track.table(f"answers_{seen.step:05d}", shown)
        verdict = self._guard.observe(seen)
        if self._guard.best_step == seen.step:
            self._best = self.ppo.state()
        if verdict.act == "none":
            return
        if verdict.act != "warn":
            self.ppo.beta = max(self.ppo.beta * self._watch.raise_beta, self._watch.least_beta)
        if verdict.act in ("roll_back", "stop"):
            self.ppo.restore(self._best)
        reasons = "; ".join(verdict.reasons)
        if verdict.act == "stop":
            self.stopped_because = f"the guard stopped it at step {seen.step}: {reasons}"
        event = {"step": seen.step, "act": verdict.act, "reasons": reasons, "beta": self.ppo.beta}
        self.events.append(event)
        context.track.table(f"guard_{seen.step:05d}", [event])
        say(f"{context.name}: guard at step {seen.step}: {verdict.act.replace('_', ' ')} ({reasons})")

    def save(self, root: Path) -> None:
        """Write a sealed checkpoint of everything, and remove all but the newest ones."""
        with checkpoints.save(root, self.steps_done) as folder:
            best = {f"best.{name}": tensor for name, tensor in self._best.items()}
            save_file(self.ppo.state() | best, folder / TENSORS)
            record = {
                "steps_done": self.steps_done,
                "beta": self.ppo.beta,
                "guard": self._guard.state_dict(),
                "curve": self.curve,
                "looks": self.looks,
                "answers": self.answers,
                "events": self.events,
                "stopped_because": self.stopped_because,
            }
            (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
        checkpoints.keep_newest(root, KEPT_CHECKPOINTS)

    def resume(self, root: Path) -> None:
        """Go on from the newest whole checkpoint under `root`, if there is one."""
        folder = checkpoints.newest_verified(root)
        if folder is None:
            return
        tensors = load_file(folder / TENSORS)
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        self._best = {
            name.removeprefix("best."): each for name, each in tensors.items() if name.startswith("best.")
        }
        self.ppo.restore(tensors)
        self.ppo.beta = record["beta"]
        self._guard.load_state_dict(record["guard"])
        self.steps_done, self.stopped_because = record["steps_done"], record["stopped_because"]
        self.curve, self.looks = record["curve"], record["looks"]
        self.answers, self.events = record["answers"], record["events"]


def rows_of_step(step: int, episodes: int, answers: int, rows: int, seed: int) -> list[int]:
    """The rows that a step answers, each `answers` times: every pass over the data sees each row once, in an
    order of its own.
    """
    prompts = episodes // answers
    draws = range(step * prompts, (step + 1) * prompts)
    passes = {draw // rows for draw in draws}
    orders = {each: np.random.default_rng((seed, each)).permutation(rows) for each in passes}
    return [int(orders[draw // rows][draw % rows]) for draw in draws for _ in range(answers)]
