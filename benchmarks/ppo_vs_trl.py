"""PPO here against the last PPO of TRL (PPOTrainer of trl 1.12.0): speed, memory, and what is learnt.

Both start from the same Llama with random weights, answer the same prompts, are scored by the same reward
model (good words less bad ones), and take the same number of steps with the same batch, epochs,
minibatches, response length, losses, KL penalty and learning rate, in float32 without gradient
checkpointing. `lora` trains the same adapter on either side; TRL's value function is a second model then,
trained whole, as TRL has it. `full` trains everything. Each run is a process of its own. Memory is its peak
less that after the bare imports; the reward is that of 128 answers to held-out prompts, sampled from either
result in one way with the same random numbers. Beside the ratio by the clock stands that by processor time,
which the work of others on the machine leaves alone.

    python benchmarks/ppo_vs_trl.py [--sizes small large] [--methods lora full] [--seeds 3] [--threads 2]

Installs trl 1.12.0 into .work/, beside the environment's TRL. Prints a table and writes
benchmarks/results/ppo_vs_trl.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.metrics.report import markdown
from tasks.stage.files import write_json
from tasks.stage.memory import peak_memory

if TYPE_CHECKING:
    from tasks.data.records import Example
    from tasks.lm.model import LanguageModel
    from tasks.rlhf.rollout import Reward

RESULT = Path("benchmarks/results/ppo_vs_trl.json")
TRL = "1.12.0"
BARS = {"speed_ratio": 2.0, "memory_ratio": 0.5}  # at least, at the larger size at most
LORA = {"r": 8, "alpha": 16, "dropout": 0, "target_modules": "all-linear"}
TEMPERATURE, KL, CLIP, VALUE_CLIP, VALUE_WEIGHT, GAMMA, LAMBDA = 1.0, 0.05, 0.2, 0.2, 0.1, 1.0, 0.95
EPOCHS, MINIBATCHES, ADAM_EPS, NO_CLIPPING = 4, 2, 1e-5, 1e9
LEARNING_RATES = {"lora": 3e-3, "full": 3e-3}
PROMPTS, HELD_OUT, PROMPT_WORDS, RESPONSE_TOKENS = 256, 128, (44, 60), 24
PAD, END = "<pad>", "</s>"


@dataclass(frozen=True)
class Size:
    """A model, and how long it is trained: `steps` of `episodes` each, the first of which is not timed."""

    width: int
    layers: int
    feed_forward: int
    vocabulary: int
    episodes: int
    steps: int


SIZES = {
    "small": Size(128, 4, 512, 1_000, episodes=32, steps=10),
    "large": Size(512, 8, 2_304, 8_000, episodes=16, steps=3),
}
JUDGE = Size(128, 4, 512, 0, 0, 0)  # the reward model; its vocabulary is the policy's


def install_trl(folder: Path) -> None:
    """Put the old TRL into `folder`, unless it is there."""
    if not (folder / "trl").is_dir():
        print(f"Installing trl {TRL} into {folder} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, "--no-deps", "--target", str(folder), f"trl=={TRL}"], check=True)


# What both sides share


def prepare(size: Size, folder: Path) -> None:
    """Write the policy, the reward model and the prompts."""
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    words = [PAD, END, *(f"word{number}" for number in range(2, size.vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left"
    )

    def config(of: Size, **options: Any) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=of.width,
            intermediate_size=of.feed_forward,
            num_hidden_layers=of.layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            **options,
        )

    torch.manual_seed(0)
    policy = LlamaForCausalLM(config(size, initializer_range=size.width**-0.5))
    policy.generation_config.eos_token_id, policy.generation_config.pad_token_id = 1, 0
    judge = LlamaForSequenceClassification(config(JUDGE, num_labels=1))
    _count_words(judge)
    for model, name in ((policy, "policy"), (judge, "reward")):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    draw = random.Random(0)
    neutral = words[3::3]
    prompts = [
        " ".join(draw.choices(neutral, k=draw.randint(*PROMPT_WORDS))) for _ in range(PROMPTS + HELD_OUT)
    ]
    write_json(folder / "prompts.json", prompts)


def _count_words(judge: Any) -> None:
    """Set the weights so that the score is the good words less the bad ones, in proportion to all words.

    The first number of an embedding is +1, -1 or 0 for a good, a bad and a neutral word, the second makes all
    embeddings as long. The first layer attends to everything alike and writes the mean of the first number into
    the third; the other layers change nothing.
    """
    import torch

    with torch.no_grad():
        for name, parameter in judge.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        words = judge.model.embed_tokens.weight
        kind = torch.arange(len(words)) % 3
        words[:, 0] = (kind == 1).float() - (kind == 2).float()
        words[:2, 0] = 0
        words[:, 1] = (words.shape[1] - words[:, 0].square()).sqrt()
        attention = judge.model.layers[0].self_attn
        attention.v_proj.weight[0, 0] = 1
        attention.o_proj.weight[2, 0] = 1
        judge.score.weight[0, 2] = 20


def examples(folder: Path) -> "list[Example]":
    """The prompts as examples: those to train on, then those held out."""
    from tasks.data.records import Example

    return [
        Example(id=str(at), task="words", instruction="{input}", input=prompt, outputs=("none",), group=str(at))
        for at, prompt in enumerate(json.loads((folder / "prompts.json").read_text(encoding="utf-8")))
    ]


def reward_model(folder: Path) -> "Reward":
    """The reward as the stage ppo reads it."""
    from tasks.rlhf.scoring import weighted_sum
    from tasks.rlhf.settings import ModelPart

    part = ModelPart(
        kind="model",
        source=str(folder / "reward"),
        revision=None,
        label=None,
        squash=None,
        batch_size=32,
        weight=1.0,
    )
    return weighted_sum({"words": part}, _compute())


def held_out_reward(lm: "LanguageModel", folder: Path) -> float:
    """Mean reward of one answer to each held-out prompt."""
    import torch

    from tasks.lm.collate import encode_prompts
    from tasks.rlhf.policy import Policy
    from tasks.rlhf.rollout import respond_by_sampling

    asked = examples(folder)[PROMPTS:]
    uniforms = torch.rand(len(asked), RESPONSE_TOKENS, generator=torch.Generator().manual_seed(0))
    policy = Policy(lm, torch.nn.Linear(lm.model.config.hidden_size, 1), TEMPERATURE, None, None)
    prompts = encode_prompts(lm, [example.prompt for example in asked])
    answers = respond_by_sampling(policy, prompts, uniforms, batch_size=32).answers
    return statistics.fmean(reward_model(folder)(asked, answers).total)


def _compute() -> Any:
    from tasks.stage import Compute

    return Compute(device="cpu", precision="fp32", threads=None, processes=1, accelerate=None)


class Clocks(NamedTuple):
    """Seconds by the clock, and of this process on all processors."""

    wall: float
    cpu: float


def _clocks() -> Clocks:
    return Clocks(time.perf_counter(), time.process_time())


def _peak_megabytes() -> float:
    return peak_memory() / 2**20


# Ours


def ours(size: Size, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train with this project's PPO."""
    import peft  # noqa: F401 - so that its memory counts as the imports'
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401

    from tasks.lm.collate import encode_prompts
    from tasks.lm.model import load
    from tasks.rlhf.policy import new_policy
    from tasks.rlhf.settings import Kl, Rollouts, Update
    from tasks.rlhf.trainer import Ppo

    bare = _peak_megabytes()
    torch.manual_seed(seed)
    lm = load(folder / "policy", _compute(), trainable=True)
    policy = new_policy(lm, method, LORA, TEMPERATURE)  # type: ignore[arg-type]
    rollouts = Rollouts(
        episodes=size.episodes,
        answers=1,
        batch_size=size.episodes,
        max_prompt_tokens=256,
        max_response_tokens=RESPONSE_TOKENS,
        temperature=TEMPERATURE,
        unfinished_penalty=0,
        engine=None,
    )
    update = Update(
        learning_rate=LEARNING_RATES[method],
        value_learning_rate=LEARNING_RATES[method],
        value_warmup=0,
        epochs=EPOCHS,
        minibatches=MINIBATCHES,
        shuffle="episodes",
        micro_batch_size=None,
        gamma=GAMMA,
        lam=LAMBDA,
        clip=CLIP,
        value_clip=VALUE_CLIP,
        value_weight=VALUE_WEIGHT,
        max_grad_norm=NO_CLIPPING,
        stop_at_kl=None,
    )
    kl = Kl(beta=KL, target=None, horizon=1)
    trainer = Ppo(policy, reward_model(folder), kl, rollouts, update, size.steps, seed)
    asked = examples(folder)[:PROMPTS]
    prompts = encode_prompts(lm, [example.prompt for example in asked])
    order = torch.randperm(PROMPTS, generator=torch.Generator().manual_seed(seed)).tolist()
    times, curve = [_clocks()], []
    for number in range(size.steps):
        rows = [order[(number * size.episodes + at) % PROMPTS] for at in range(size.episodes)]
        seen = trainer.step(number, [asked[row] for row in rows], [prompts[row] for row in rows])
        times.append(_clocks())
        curve.append(seen["reward"])
    return _measured(size, bare, times, curve) | {"reward": held_out_reward(policy.lm, folder)}


# Theirs


def theirs(size: Size, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train with TRL's PPOTrainer."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig, TaskType
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    assert trl.__version__ == TRL, f"trl {trl.__version__} where {TRL} should be"
    bare = _peak_megabytes()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))[:PROMPTS]
    times: list[Clocks] = []
    curve: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **options: Any) -> None:
            times.append(_clocks())

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **rest: Any) -> None:
            times.append(_clocks())
            curve.append(logs["objective/scores"])

    value_model = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    torch.nn.init.zeros_(value_model.score.weight)  # as ours begins
    peft_config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=LORA["r"],
        lora_alpha=LORA["alpha"],
        lora_dropout=LORA["dropout"],
        target_modules=LORA["target_modules"],
    )
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            num_sample_generations=0,
            seed=seed,
            total_episodes=size.steps * size.episodes,
            per_device_train_batch_size=size.episodes,
            local_rollout_forward_batch_size=size.episodes,
            num_mini_batches=MINIBATCHES,
            num_ppo_epochs=EPOCHS,
            response_length=RESPONSE_TOKENS,
            stop_token="eos",
            temperature=TEMPERATURE,
            learning_rate=LEARNING_RATES[method],
            adam_epsilon=ADAM_EPS,
            kl_coef=KL,
            cliprange=CLIP,
            cliprange_value=VALUE_CLIP,
            vf_coef=VALUE_WEIGHT,
            gamma=GAMMA,
            lam=LAMBDA,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        ref_model=None,  # the adapter switched off, or a copy
        reward_model=AutoModelForSequenceClassification.from_pretrained(folder / "reward"),
        value_model=value_model,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in tokenizer(prompts)["input_ids"]]),
        peft_config=peft_config if method == "lora" else None,
        callbacks=[Watch()],
    )
    trainer.train()
    found = _measured(size, bare, times, curve)

    from tasks.lm.model import LanguageModel

    return found | {"reward": held_out_reward(LanguageModel(trainer.model.policy.eval(), tokenizer), folder)}


def _measured(size: Size, bare: float, times: Sequence[Clocks], curve: Sequence[float]) -> dict[str, Any]:
    episodes = size.episodes * (len(times) - 2)
    return {
        "episodes_per_second": episodes / (times[-1].wall - times[1].wall),
        "episodes_per_cpu_second": episodes / (times[-1].cpu - times[1].cpu),
        "peak_megabytes": _peak_megabytes(),
        "bare_megabytes": bare,
        "curve": [round(value, 4) for value in curve],
    }


# Side by side


def start_reward(size: Size, folder: Path) -> float:
    """What the held-out reward is before training."""
    from tasks.lm.model import load

    return held_out_reward(load(folder / "policy", _compute()), folder)


def compared(runs: Mapping[str, Sequence[Mapping[str, Any]]], before: float) -> dict[str, Any]:
    """The numbers of one size and method: medians over seeds, rewards with their mean and spread."""
    sides = {side: _summary(found) for side, found in runs.items()}
    mine, other = sides["ours"], sides["theirs"]
    return {
        "speed_ratio": round(mine["episodes_per_second"] / other["episodes_per_second"], 2),
        "cpu_speed_ratio": round(mine["episodes_per_cpu_second"] / other["episodes_per_cpu_second"], 2),
        "memory_ratio": round(mine["memory_growth_megabytes"] / other["memory_growth_megabytes"], 3),
        "reward_before": round(before, 3),
        "reward_ours": mine["reward"],
        "reward_theirs": other["reward"],
        **sides,
    }


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rewards = [run["reward"] for run in runs]
    growth = [run["peak_megabytes"] - run["bare_megabytes"] for run in runs]
    return {
        **{
            name: round(statistics.median(run[name] for run in runs), 3)
            for name in ("episodes_per_second", "episodes_per_cpu_second")
        },
        "peak_megabytes": round(statistics.median(run["peak_megabytes"] for run in runs)),
        "memory_growth_megabytes": round(statistics.median(growth), 1),
        "reward": {
            "mean": round(statistics.fmean(rewards), 3),
            "spread": round(statistics.stdev(rewards), 3) if len(rewards) > 1 else None,
            "seeds": [round(reward, 3) for reward in rewards],
        },
        "curves": [run["curve"] for run in runs],
    }


def table(result: Mapping[str, Any]) -> dict[str, Any]:
    """One line a side of each comparison, then their ratios."""
    lines = []
    for name, found in result.items():
        for side in ("ours", "theirs"):
            one = found[side]
            reward = f"{one['reward']['mean']:.2f}"
            if one["reward"]["spread"] is not None:
                reward += f" ± {one['reward']['spread']:.2f}"
            lines.append(
                [
                    name.replace("_", ", "),
                    side,
                    f"{one['episodes_per_second']:.2f}",
                    f"{one['memory_growth_megabytes']:.0f}",
                    reward,
                ]
            )
        lines.append(["", "ratio", f"{found['speed_ratio']:.2f}×", f"{found['memory_ratio']:.2f}×", ""])
    return {"header": ["Model", "PPO", "Episodes/s", "Memory MB", "Reward"], "lines": lines}


def reached(result: Mapping[str, Any]) -> bool:
    """Whether each comparison holds its bars; a reward may be below theirs by the noise of the seeds."""
    held = []
    for name, found in result.items():
        held.append(found["speed_ratio"] >= BARS["speed_ratio"])
        if name.startswith("large"):
            held.append(found["memory_ratio"] <= BARS["memory_ratio"])
        mine, other = found["reward_ours"], found["reward_theirs"]
        if mine["spread"] is not None:
            noise = (mine["spread"] ** 2 + other["spread"] ** 2) ** 0.5
            held.append(mine["mean"] >= other["mean"] - noise)
    return all(held)


def main() -> int:
    """Run all comparisons, ours and theirs in turn; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--trl", type=Path, default=Path(".work") / f"trl-{TRL}", help="where the old TRL lies")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--run", choices=("prepare", "before", "ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return _child(options)
    install_trl(options.trl)
    result: dict[str, Any] = {}
    for name in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            _run(options, "prepare", name, Path(folder))
            before = _run(options, "before", name, Path(folder))
            for method in options.methods:
                runs: dict[str, list[Any]] = {"ours": [], "theirs": []}
                for seed in range(options.seeds):
                    for side, found in runs.items():
                        print(f"{name} {method} {side}, seed {seed} ...", file=sys.stderr, flush=True)
                        found.append(_run(options, side, name, Path(folder), method, seed))
                result[name if method == "lora" else f"{name}_{method}"] = compared(runs, before)
                _write(options, result)  # each time: a run that is broken off has shown something
    shown = table(result)
    print(markdown(shown["header"], shown["lines"]))
    held = reached(result)
    print(
        f"bars {'held' if held else 'MISSED'}: {BARS['speed_ratio']}× the episodes/s, at the larger size "
        f"{BARS['memory_ratio']:.0%} of the memory, a reward not below theirs beyond the noise of the seeds"
    )
    return 0 if held else 3


def _run(
    options: argparse.Namespace, what: str, size: str, folder: Path, method: str = "lora", seed: int = 0
) -> Any:
    """One run in a process of its own; what it found."""
    command = [sys.executable, __file__, "--run", what, "--sizes", size, "--methods", method]
    command += ["--seed", str(seed), "--folder", str(folder), "--threads", str(options.threads)]
    paths = [*([str(options.trl.resolve())] if what == "theirs" else []), str(Path.cwd())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    environment |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        sys.exit(done.returncode)
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def _child(options: argparse.Namespace) -> int:
    size, method = SIZES[options.sizes[0]], options.methods[0]
    found: Any = None
    match options.run:
        case "prepare":
            prepare(size, options.folder)
        case "before":
            found = start_reward(size, options.folder)
        case "ours":
            found = ours(size, method, options.seed, options.folder)
        case "theirs":
            found = theirs(size, method, options.seed, options.folder)
    write_json(options.folder / "found.json", found)
    return 0


def _write(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    about = {
        "table": table(result),
        "bars": BARS,
        "reached": reached(result),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "versions": versions(),
    }
    write_json(options.out, {**result, **about})


def versions() -> dict[str, str]:
    """What was compared, and on what."""
    names = ("torch", "transformers", "peft", "accelerate")
    return {"python": platform.python_version(), "trl": TRL} | {name: version(name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
