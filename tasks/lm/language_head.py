"""The language-model head beside a classifier, so that likelihood can be a part of its score.

A classifier that grew from a language model still has the states that predict every token of an answer, but no
head to read them with. Which of two facts a dialogue supports is in those states long before a new head learns
to tell.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tasks.lm.collate import collate
from tasks.lm.model import LanguageModel
from tasks.lm.respond import response_hidden, response_outputs, token_logprobs

FILE = "language_head.safetensors"


@dataclass(frozen=True)
class LanguageHead:
    """From last hidden states `[..., D]` to logits `[..., V]`; it is never trained."""

    weight: Tensor  # [V, D]
    bias: Tensor  # [V]

    def mean_logprob(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The mean log-probability `[N]` of the tokens `ids` `[N, T]` that `hidden` `[N, T, D]` predicts."""
        logits = F.linear(hidden, self.weight.to(hidden.dtype), self.bias.to(hidden.dtype)).float()
        return (token_logprobs(logits, ids) * mask).sum(dim=1) / mask.sum(dim=1)

    def to(self, device: torch.device) -> "LanguageHead":
        """The same head there."""
        return LanguageHead(self.weight.to(device), self.bias.to(device))

    def save(self, folder: Path) -> None:
        """Write the head beside a model."""
        save_file({"weight": self.weight.cpu(), "bias": self.bias.cpu()}, folder / FILE)


def head_of(lm: LanguageModel) -> LanguageHead:
    """A copy of the head of `lm`, with the factor that T5 puts before it."""
    end = [lm.tokenizer.eos_token_id]
    probe = collate(lm, [end], [end])
    with torch.inference_mode():
        scale = response_outputs(lm, probe).hidden.norm() / response_hidden(lm, probe).norm()
    layer = lm.model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    weight = layer.weight.detach() * scale.item()
    return LanguageHead(weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().clone())


def load_head(folder: Path, device: torch.device) -> LanguageHead:
    """The head that `save` wrote."""
    return LanguageHead(**load_file(folder / FILE)).to(device)
