"""Attention that keeps no scores: the same numbers, behind a mask."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from lm_toys import COMPUTE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tasks.lm import attention
from tasks.lm.attention import ALWAYS_MASKED, always_masked, on_device


def model(key_value_heads: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=key_value_heads, max_position_embeddings=64,
    )  # fmt: skip
    found: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor | None]]:
    """The masks that torch's attention was called with."""
    masks: list[Tensor | None] = []
    attend = F.scaled_dot_product_attention

    def watched(*tensors: Tensor, attn_mask: Tensor | None = None, **options: object) -> Tensor:
        masks.append(attn_mask)
        return attend(*tensors, attn_mask=attn_mask, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    yield masks


def test_without_padding_results_and_gradients_are_those_of_the_usual_attention(
    seen: list[Tensor | None],
) -> None:
    ids = torch.arange(18).view(2, 9)
    of_each = []
    for implementation in ("sdpa", ALWAYS_MASKED):
        lm = model()
        lm.set_attn_implementation(implementation)
        logits = lm(ids).logits
        logits.square().sum().backward()
        of_each.append((logits, [weight.grad for weight in lm.parameters()]))
    usual, masked = seen[:2], seen[2:]
    assert usual == [None, None]
    assert [mask is not None for mask in masked] == [True, True]
    torch.testing.assert_close(of_each[1], of_each[0], rtol=1e-5, atol=1e-4)


def test_a_token_at_a_time_and_half_precision_go_the_usual_way(seen: list[Tensor | None]) -> None:
    lm = model()
    lm.set_attn_implementation(ALWAYS_MASKED)
    cache = lm(torch.arange(9).view(1, 9), use_cache=True).past_key_values
    lm(torch.tensor([[3]]), past_key_values=cache, use_cache=True)
    lm.to(torch.bfloat16)(torch.arange(9).view(1, 9))
    assert [mask is None for mask in seen] == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    ("said", "looks_back"), [({}, True), ({"is_causal": None}, True), ({"is_causal": False}, False)]
)
def test_a_token_sees_what_stands_before_it_unless_the_model_says_otherwise(
    seen: list[Tensor | None], said: dict[str, bool | None], looks_back: bool
) -> None:
    layer = model().model.layers[0].self_attn
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    always_masked(layer, query, key, key, None, **said)
    (mask,) = seen
    assert mask is not None
    assert bool(mask.all()) != looks_back


@pytest.mark.parametrize(
    ("kind", "heads", "changed"), [("cuda", 2, True), ("cuda", 4, False), ("cpu", 2, False)]
)
def test_only_shared_keys_on_a_gpu_need_it(
    monkeypatch: pytest.MonkeyPatch, kind: str, heads: int, changed: bool
) -> None:
    lm = model(heads)
    monkeypatch.setattr(attention, "device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(type(lm), "device", torch.device(kind))
    placed = on_device(lm, COMPUTE)
    assert placed is lm
    assert (lm.config._attn_implementation == ALWAYS_MASKED) == changed
    assert "attn" not in lm.config.to_json_string()  # nothing of it is saved
