"""Attention of models whose heads share keys and values (2305.13245), in float32 on a GPU.

transformers leaves the sharing to torch where a batch needs no mask. Of torch's kernels for float32 only one
can share: it writes out the scores of all pairs, `[B, heads, P, P]`, and keeps them for the gradient. Behind
a mask the keys are copied for each head, and a kernel that keeps no scores takes them.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tasks.lm.device import device
from tasks.stage import Compute

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALWAYS_MASKED = "sdpa_always_masked"


def on_device(model: "PreTrainedModel", compute: Compute) -> "PreTrainedModel":
    """The model on the device of `compute`; on a GPU no float32 layer of it keeps scores for the gradient."""
    model.to(device(compute))
    heads = getattr(model.config, "num_attention_heads", None)
    shared = getattr(model.config, "num_key_value_heads", heads) != heads
    if shared and model.device.type == "cuda" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ALWAYS_MASKED)
    return model


def always_masked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of queries `[B, H, P, D]`, where there is no mask behind one of all that is to be seen."""
    length = query.shape[2]
    if attention_mask is None and query.dtype == torch.float32 and length == key.shape[2] > 1:
        attention_mask = torch.ones((1, 1, length, length), dtype=torch.bool, device=query.device)
        said = options.get("is_causal")
        if getattr(module, "is_causal", True) if said is None else said:
            attention_mask = attention_mask.tril()
    found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return found


AttentionInterface.register(ALWAYS_MASKED, always_masked)
AttentionMaskInterface.register(ALWAYS_MASKED, sdpa_mask)
