"""The policy, its reference and its value function: one frozen backbone in the place of four models.

The policy is an adapter on the backbone, the reference is the same model with the adapter off, and the value
function is a linear head on what the policy's own language-model head reads. Two options cost a copy of the
model each: `full` tuning, whose reference is a frozen copy, and a value function with a trunk of its own, which
may begin as the reward model's (arXiv 2203.02155 appendix C.4).
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tasks.lm.classifier import load_classifier
from tasks.lm.collate import Batch
from tasks.lm.engine import Engine
from tasks.lm.model import LanguageModel
from tasks.lm.peft import adapt, merged
from tasks.lm.respond import entropy, response_hidden, response_outputs, token_logprobs
from tasks.rlhf.settings import Value
from tasks.stage import Compute, ParamsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Evaluation(NamedTuple):
    """What the policy thinks of given responses; each `[B, T]`, of no meaning on padding."""

    logprobs: Tensor
    entropy: Tensor  # nats
    values: Tensor


@dataclass(frozen=True)
class Policy:
    """What PPO trains, and what it is held against."""

    lm: LanguageModel
    value_head: nn.Linear
    temperature: float  # of the sampling distribution, which is the policy
    reference: LanguageModel | None  # None: `lm` with its adapter off
    critic: LanguageModel | None  # None: the value head reads the policy's own hidden states
    engine: Engine | None = None  # what samples; None: `lm` itself

    def evaluate(self, batch: Batch, critic_states: Tensor | None = None) -> Evaluation:
        """Log-probabilities, entropies and values of the response tokens, with gradients.

        `critic_states` `[B, P, D]` is what the critic's encoder made of the prompts; None: it reads them now.
        """
        batch = batch.to(self.lm.device)
        logits, hidden = response_outputs(self.lm, batch)
        logits = logits / self.temperature
        if self.critic is not None:
            hidden = response_hidden(self.critic, batch._replace(prompt_states=critic_states))
        return Evaluation(
            logprobs=token_logprobs(logits, batch.response_ids),
            entropy=entropy(logits),
            values=self.values(hidden),
        )

    def values(self, hidden: Tensor) -> Tensor:
        """Values `[B, T]` from the hidden states `[B, T, D]` before each response token."""
        values: Tensor = self.value_head(hidden.float()).squeeze(-1)
        return values

    @contextmanager
    def reference_model(self) -> Iterator[LanguageModel]:
        """The reference, for the time of the block; the policy itself must not be used inside."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.lm.model.disable_adapter():
                yield self.lm

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities `[B, T]` of the response tokens under the reference policy."""
        batch = batch.to(self.lm.device)
        with self.reference_model() as reference:
            logits = response_outputs(reference, batch).logits
        return token_logprobs(logits / self.temperature, batch.response_ids)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained, in an order that does not change."""
        parts: dict[str, nn.Module] = {"policy": self.lm.model, "value_head": self.value_head}
        if self.critic is not None:
            parts["critic"] = self.critic.model
        for part, module in parts.items():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{part}.{name}", parameter

    def answering(self) -> LanguageModel:
        """A plain model that answers as the policy does; the policy itself is not changed."""
        return merged(LanguageModel(copy.deepcopy(self.lm.model), self.lm.tokenizer))


def reads_once(lm: LanguageModel) -> bool:
    """Whether what the model makes of a prompt stays as it is: it has an encoder, and that is not trained."""
    return lm.is_encoder_decoder and not any(
        parameter.requires_grad for parameter in lm.model.get_encoder().parameters()
    )


def new_policy(
    lm: LanguageModel,
    method: Literal["lora", "full"],
    options: Mapping[str, Any],
    temperature: float,
    critic: LanguageModel | None = None,
    engine: Engine | None = None,
) -> Policy:
    """A policy that begins as `lm`, a model without adapter. Dropout is off, and stays off.

    The value function reads the policy's own hidden states, or those of `critic`, which is trained by the same
    `method`. Its head begins at zero, so that the first advantages are the rewards themselves.
    """
    reference = frozen(lm) if method == "full" else None
    own_trunk = None if critic is None else adapt(critic, method, options)
    policy = adapt(lm, method, options)
    for model in filter(None, (policy, own_trunk)):
        model.model.eval()
    width = lm.model.get_output_embeddings().in_features
    head = nn.Linear(width, 1).to(lm.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return Policy(policy, head, temperature, reference, own_trunk, engine)


def new_critic(value: Value, lm: LanguageModel, compute: Compute) -> LanguageModel | None:
    """The trunk of the value function beside the policy `lm`; None when it is the policy's own.

    Raises UserError when the classifier it begins as cannot be opened, and ParamsError when that is of another
    architecture.
    """
    if value.trunk == "shared":
        return None
    if value.source is None:
        return copied(lm)
    return trunk_of(load_classifier(value.source, compute).model, lm)


def trunk_of(classifier: "PreTrainedModel", lm: LanguageModel) -> LanguageModel:
    """A copy of `lm` with the weights of a sequence classifier on the same architecture.

    Raises ParamsError when the two are of different architectures.
    """
    found = copied(lm)
    weights = classifier.base_model.state_dict()
    trunk = found.model.base_model
    if {name: each.shape for name, each in weights.items()} != {
        name: each.shape for name, each in trunk.state_dict().items() if not name.startswith("lm_head.")
    }:
        raise ParamsError("ppo.value.source: not of the architecture of the model that is trained")
    trunk.load_state_dict(weights, strict=False)
    return found


def copied(lm: LanguageModel) -> LanguageModel:
    """The same model again, with weights of its own."""
    return LanguageModel(copy.deepcopy(lm.model), lm.tokenizer)


def frozen(lm: LanguageModel) -> LanguageModel:
    """A copy that is never trained."""
    found = copied(lm)
    found.model.requires_grad_(False).eval()
    return found
