"""LoRA's layer: its equation, its gradients, and that it gives way where there is more to do than that."""

from typing import Any

import pytest
import torch
from lm_toys import FAMILIES, shake, texts, toy
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from tasks.lm import lora, peft
from tasks.lm.collate import collate, encode_prompts, encode_responses
from tasks.lm.lora import LoraLinear, LowRankUpdate
from tasks.lm.model import LanguageModel
from tasks.lm.peft import adapt
from tasks.lm.respond import response_logprobs

LORA: dict[str, Any] = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}


def adapted(family: str, **changes: Any) -> LanguageModel:
    torch.manual_seed(2)
    lm = adapt(toy(family), "lora", {**LORA, **changes})
    shake(lm)
    return lm


def layer_of(lm: LanguageModel) -> LoraLinear:
    return next(module for module in lm.model.modules() if isinstance(module, LoraLinear))


def learnt(lm: LanguageModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of some responses, and the gradients of their sum."""
    prompts, responses = encode_prompts(lm, texts(6)), encode_responses(lm, texts(6, seed=6))
    lm.model.zero_grad()
    logprobs = response_logprobs(lm, collate(lm, prompts, responses))
    logprobs.sum().backward()  # type: ignore[no-untyped-call]
    return logprobs.detach(), {
        name: parameter.grad.clone()
        for name, parameter in lm.model.named_parameters()
        if parameter.grad is not None
    }


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of what comes by way of `LowRankUpdate`."""
    shapes: list[torch.Size] = []
    apply = LowRankUpdate.apply

    class Heard:
        @staticmethod
        def apply(x: Tensor, *rest: Any) -> Tensor:
            shapes.append(x.shape)
            return apply(x, *rest)

    monkeypatch.setattr(lora, "LowRankUpdate", Heard)
    return shapes


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (1, 3)])
def test_its_gradients_are_those_of_its_values(shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    a, b, x = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 3), (6, 2), shape))
    weight = torch.randn(6, 3, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64) if biased else None

    def y(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        found: Tensor = LowRankUpdate.apply(x, weight, bias, a, b, 0.5)  # type: ignore[no-untyped-call]
        return found

    expected = x @ weight.T + 0.5 * x @ a.T @ b.T + (0 if bias is None else bias)
    torch.testing.assert_close(y(x, a, b), expected)
    torch.autograd.gradcheck(y, (x, a, b))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_pefts_layer(family: str, taken: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = adapted(family)
    logprobs, gradients = learnt(lm)
    layers = sum(isinstance(module, Linear) for module in lm.model.modules())
    assert len(taken) == layers > 6
    monkeypatch.setattr(LoraLinear, "forward", Linear.forward)
    expected, their_gradients = learnt(lm)
    assert len(taken) == layers
    torch.testing.assert_close(logprobs, expected)
    assert gradients.keys() == their_gradients.keys()
    assert len(gradients) == 2 * layers
    for name, gradient in gradients.items():
        largest = float(their_gradients[name].abs().max())
        torch.testing.assert_close(gradient, their_gradients[name], atol=1e-5 * largest, rtol=1e-4)


def test_an_input_that_is_not_contiguous_is_read_as_it_is(taken: list[torch.Size]) -> None:
    layer = layer_of(adapted("llama"))
    x = torch.randn(layer.in_features, 3, 5).permute(2, 1, 0)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    assert taken == [x.shape, x.shape]


def test_dropout_is_drawn_in_training_alone(taken: list[torch.Size]) -> None:
    layer = layer_of(adapted("llama", dropout=0.5))
    x = torch.randn(3, layer.in_features)
    assert not torch.equal(layer.train()(x), layer(x))
    assert not taken
    assert torch.equal(layer.eval()(x), layer(x))
    assert len(taken) == 2


def test_a_second_adapter_and_one_that_is_off_are_pefts_business(taken: list[torch.Size]) -> None:
    lm = adapted("llama")
    layer = layer_of(lm)
    x = torch.randn(3, layer.in_features)
    alone = layer(x)
    with lm.model.disable_adapter():
        torch.testing.assert_close(layer(x), layer.base_layer(x))
    assert len(taken) == 1
    lm.model.add_adapter("second", lm.model.peft_config["default"])
    nn.init.normal_(layer.lora_B["second"].weight)
    lm.model.base_model.set_adapter(["default", "second"])
    added = layer.scaling["second"] * layer.lora_B["second"](layer.lora_A["second"](x))
    torch.testing.assert_close(layer(x), alone + added)
    assert len(taken) == 1


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_kinds_of_lora_are_pefts_business(more: dict[str, Any], taken: list[torch.Size]) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **more)
    layer = layer_of(LanguageModel(peft._wrap(toy("llama").model, config), toy("llama").tokenizer))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, layer.in_features)
    assert torch.equal(layer(x), Linear.forward(layer, x))
    assert not torch.allclose(layer(x), layer.base_layer(x))
    assert not taken


def test_a_second_derivative_is_refused() -> None:
    a, b, x = (torch.randn(2, 2, requires_grad=True) for _ in range(3))
    y = LowRankUpdate.apply(x, torch.eye(2), None, a, b, 1.0)  # type: ignore[no-untyped-call]
    [first] = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()  # type: ignore[no-untyped-call]


def test_mixed_precision_and_a_base_that_is_trained_are_pefts_business(taken: list[torch.Size]) -> None:
    layer = layer_of(adapted("llama"))
    x = torch.randn(3, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.base_layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad is not None
    assert not taken


def test_parts_of_weights_are_left_to_the_modules_that_gather_them(taken: list[torch.Size]) -> None:
    layer = layer_of(adapted("llama"))
    whole, base = layer.base_layer.weight.data, layer.base_layer
    base.weight.data = torch.empty(0)

    def gather(*_: Any) -> None:
        base.weight.data = whole

    base.register_forward_pre_hook(gather)
    assert layer(torch.randn(3, layer.in_features)).shape == (3, layer.out_features)
    assert not taken
