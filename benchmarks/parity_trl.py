"""PPO here against the equations of the last PPO of TRL (1.12.0), on the same weights and inputs.

TRL's PPOTrainer takes two steps on a small Llama with random weights, in which every parameter moves. At each
of its gradients our policy is given its weights of the moment, reads the same episodes and computes the same:
the log-probabilities when sampling, of the reference and of the update, the values, generalised advantages and
returns, and both losses. TRL's numbers are read from the variables of its own training loop.

Two choices differ and are taken out by giving both sides the same input: where an answer ended early TRL puts
its score, and a value, one token behind the end token (here: on it), and it whitens with the unbiased variance
(here: the biased one, as openai/lm-human-preferences).

    python benchmarks/parity_trl.py

Installs trl 1.12.0 into .work/, beside the environment's TRL. Prints a table and writes
benchmarks/results/parity_trl.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ppo_vs_trl import TRL, install_trl, versions

from tasks.metrics.report import markdown
from tasks.stage.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.lm.collate import Batch
    from tasks.rlhf.policy import Policy

RESULT = Path("benchmarks/results/parity_trl.json")
BAR = 1e-5
TEMPERATURE, KL, CLIP, VALUE_CLIP, GAMMA, LAMBDA = 0.7, 0.05, 0.2, 0.2, 0.99, 0.95
EPISODES, STEPS, EPOCHS, RESPONSE_TOKENS, VOCABULARY = 64, 2, 3, 12, 20
LEARNING_RATE = 3e-3  # large, so that ratios leave the clip range


class Comparison:
    """Largest absolute differences by name, and how much was compared."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}
        self.numbers: dict[str, int] = {}

    def add(self, name: str, ours: "Tensor", theirs: "Tensor", mask: "Tensor | None" = None) -> None:
        """Compare two tensors, where `mask` is 1."""
        assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
        difference = (ours.detach() - theirs.detach()).abs()
        difference = difference if mask is None else difference[mask.bool()]
        self.largest[name] = max(self.largest.get(name, 0.0), float(difference.max()))
        self.numbers[name] = self.numbers.get(name, 0) + difference.numel()


def compare(folder: Path) -> dict[str, Any]:
    """Let TRL train, and compute at each of its gradients what it computes."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, set_seed
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from tasks.lm.model import LanguageModel
    from tasks.rlhf.policy import new_policy

    assert trl.__version__ == TRL, f"trl {trl.__version__} where {TRL} should be"
    set_seed(0)
    tokenizer, config = _tokenizer(), _config()
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    critic = LlamaForCausalLM(config)  # only its trunk is used
    value_model, reward_model = LlamaForSequenceClassification(config), LlamaForSequenceClassification(config)
    for each in (model, value_model, reward_model):
        _spread(each)
    copy = LlamaForCausalLM(config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    policy = new_policy(
        LanguageModel(copy, tokenizer), "full", {}, TEMPERATURE, LanguageModel(critic, tokenizer)
    )
    prompts = [
        torch.randint(2, VOCABULARY, (int(length),)).tolist() for length in torch.randint(4, 12, (EPISODES,))
    ]
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            num_sample_generations=0,
            total_episodes=STEPS * EPISODES,
            per_device_train_batch_size=EPISODES,
            local_rollout_forward_batch_size=EPISODES,
            num_mini_batches=2,
            num_ppo_epochs=EPOCHS,
            response_length=RESPONSE_TOKENS,
            stop_token="eos",
            temperature=TEMPERATURE,
            learning_rate=LEARNING_RATE,
            kl_coef=KL,
            cliprange=CLIP,
            cliprange_value=VALUE_CLIP,
            gamma=GAMMA,
            lam=LAMBDA,
        ),
        processing_class=tokenizer,
        model=model,
        ref_model=None,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
    )
    found = Comparison()
    counts = {"gradients": 0, "episodes": 0, "episodes_ended_early": 0, "tokens": 0, "tokens_clipped": 0}
    steps: set[int] = set()
    backward = trainer.accelerator.backward

    def watched(loss: "Tensor", **options: Any) -> None:
        """Stands in for the call that TRL computes a gradient with."""
        caller: FrameType = sys._getframe(1)
        theirs = caller.f_locals
        with torch.no_grad():
            _take_weights(policy, trainer.model)
            step = trainer.state.episode
            if step not in steps:
                steps.add(step)
                _compare_rollout(found, policy, theirs, counts)
            _compare_update(found, policy, theirs, counts)
        backward(loss, **options)

    trainer.accelerator.backward = watched
    trainer.train()
    return {
        "largest_difference": found.largest,
        "numbers_compared": found.numbers,
        "bar": BAR,
        "reached": max(found.largest.values()) <= BAR,
        **counts,
        "steps": len(steps),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": versions(),
    }


def _compare_rollout(
    found: Comparison, policy: "Policy", theirs: Mapping[str, Any], counts: dict[str, int]
) -> None:
    """What is known before the first gradient of a step: the weights are still those that sampled."""
    from tasks.rlhf.advantages import gae
    from tasks.rlhf.masked import whiten
    from tasks.rlhf.rewards import token_rewards

    rows = list(range(EPISODES))
    batch, mask = _batch(theirs, rows), ~theirs["padding_mask"]
    seen = policy.evaluate(batch)
    found.add("sampling_logprobs", seen.logprobs, theirs["logprobs"], mask)
    found.add("reference_logprobs", policy.reference_logprobs(batch), theirs["ref_logprobs"], mask)
    found.add("values", seen.values, theirs["values"], mask)

    longer = ~theirs["padding_mask_p1"]  # with the token behind the end, as TRL counts
    advantages, returns = gae(theirs["rewards"], theirs["values"], longer, GAMMA, LAMBDA)
    found.add("returns", returns, theirs["returns"], longer)

    whole = mask.all(dim=1)  # answers that were cut at the limit: here all choices agree
    scored = token_rewards(theirs["scores"], seen.logprobs, policy.reference_logprobs(batch), mask, KL)
    found.add("token_rewards", scored[whole], theirs["rewards"][whole])
    own, _ = gae(scored, seen.values, mask, GAMMA, LAMBDA)
    found.add("advantages", own[whole], (theirs["returns"] - theirs["values"])[whole])

    tokens = mask.sum()
    bessel = ((tokens - 1) / tokens).sqrt()
    found.add("whitened_advantages", whiten(advantages, mask) * bessel, theirs["advantages"], mask)
    counts["episodes"] += EPISODES
    counts["episodes_ended_early"] += int((~whole).sum())


def _compare_update(
    found: Comparison, policy: "Policy", theirs: Mapping[str, Any], counts: dict[str, int]
) -> None:
    """What one gradient is made of."""
    from tasks.rlhf.losses import policy_loss, value_loss

    rows = theirs["micro_batch_inds"]
    mask, longer = ~theirs["padding_mask"][rows], ~theirs["padding_mask_p1"][rows]
    seen = policy.evaluate(_batch(theirs, rows.tolist()))
    found.add("update_logprobs", seen.logprobs, theirs["new_logprobs"], mask)
    acting = policy_loss(seen.logprobs, theirs["mb_logprobs"], theirs["mb_advantage"], mask, CLIP)
    found.add("policy_loss", acting.total / mask.sum(), theirs["pg_loss"])
    found.add("update_values", seen.values, theirs["vpred"], mask)
    values = seen.values.where(mask, theirs["vpred"])  # ours has none behind the end
    valuing = value_loss(values, theirs["mb_values"], theirs["mb_return"], longer, VALUE_CLIP)
    found.add("value_loss", valuing.total / longer.sum(), theirs["vf_loss"])
    counts["gradients"] += 1
    counts["tokens"] += int(mask.sum())
    counts["tokens_clipped"] += int(acting.clipped)


def _batch(theirs: Mapping[str, Any], rows: list[int]) -> "Batch":
    """TRL's episodes at `rows`, padding and all."""
    from tasks.lm.collate import Batch

    start = theirs["context_length"]
    prompts, responses = theirs["query_responses"][rows, :start], theirs["query_responses"][rows, start:]
    mask = ~theirs["padding_mask"][rows]
    return Batch(prompts, (prompts != 0).long(), responses, mask.long())


def _take_weights(policy: "Policy", trained: Any) -> None:
    """Give our policy and value function TRL's weights of the moment."""
    policy.lm.model.load_state_dict(trained.policy.state_dict())
    assert policy.critic is not None
    policy.critic.model.model.load_state_dict(trained.value_model.model.state_dict())
    policy.value_head.weight.copy_(trained.value_model.score.weight)


def _spread(model: Any) -> None:
    """Larger weights, so that distributions are far from even."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(8 if "embed" in name else 4)


def _config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        num_labels=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, **{f"word{number}": number for number in range(2, VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words)),
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
    )


def main() -> int:
    """Compare in a process that sees the old TRL; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trl", type=Path, default=Path(".work") / f"trl-{TRL}", help="where the old TRL lies")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        write_json(options.out, compare(options.folder))
        return 0
    install_trl(options.trl)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--folder", folder, "--out", str(options.out)]
        paths = os.pathsep.join([str(options.trl.resolve()), str(Path.cwd())])
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        environment |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return done.returncode
    result = json.loads(options.out.read_text(encoding="utf-8"))
    rows = [
        (name.replace("_", " "), f"{value:.1e}", f"{result['numbers_compared'][name]:,}")
        for name, value in result["largest_difference"].items()
    ]
    print(markdown(("Against trl " + TRL, "Largest difference", "Numbers"), rows))
    print(f"all {'within' if result['reached'] else 'NOT within'} {BAR:.0e}")
    return 0 if result["reached"] else 3


if __name__ == "__main__":
    sys.exit(main())
