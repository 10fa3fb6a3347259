"""The closed-form optimum against its published value, and against every policy that one can try."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.rlhf.assess import objectives
from tasks.rlhf.optimum import closed_form, objective, two_outcomes


def test_the_published_optimum() -> None:
    best = two_outcomes(bad=0.5, reward_bad=0.0, reward_good=1.0, beta=0.2)
    assert best.bad == pytest.approx(0.0067, abs=5e-5)
    assert best.kl == pytest.approx(0.653, abs=5e-4)
    assert best.objective == pytest.approx(0.862714, abs=5e-7)
    half_bad = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    assert closed_form(half_bad, beta=0.2).tolist() == pytest.approx([0.862714, 0.0, 1.0], abs=1e-6)


CHANCE = st.floats(0.01, 0.99)
REWARD = st.floats(-3, 3)
BETA = st.floats(0.01, 5)


@given(CHANCE, REWARD, REWARD, BETA)
def test_no_policy_of_two_outcomes_does_better(bad: float, low: float, high: float, beta: float) -> None:
    best = two_outcomes(bad, low, high, beta)

    def value(chance: float) -> float:
        good = 1 - chance
        kl = chance * math.log(chance / bad) + good * math.log(good / (1 - bad))
        return chance * low + good * high - beta * kl

    assert max(value(step / 1000) for step in range(1, 1000)) <= best.objective + 1e-9
    if 1e-9 < best.bad < 1 - 1e-9:
        assert value(best.bad) == pytest.approx(best.objective, abs=1e-6)
        kl = best.bad * math.log(best.bad / bad) + (1 - best.bad) * math.log((1 - best.bad) / (1 - bad))
        assert best.kl == pytest.approx(kl, abs=1e-6)


def test_a_small_beta_does_not_overflow() -> None:
    best = two_outcomes(bad=0.5, reward_bad=-1000.0, reward_good=1000.0, beta=1e-3)
    assert best.bad == 0
    assert best.kl == pytest.approx(math.log(2), abs=1e-6)
    assert closed_form(torch.tensor([[-1000.0, 1000.0]]), beta=1e-3).item() == pytest.approx(1000.0)


def test_without_a_penalty_the_best_response_is_the_optimum() -> None:
    assert closed_form(torch.tensor([[0.25, 1.0, 0.5], [0.0, -1.0, -2.0]]), beta=0.0).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_the_share_of_the_gain_is_none_where_nothing_can_be_gained(beta: float) -> None:
    same, kl = torch.full((6, 4), 0.3), torch.full((6, 4), 0.1)
    found = objectives(same, same + 0.5, kl, beta, samples=50, seed=1)
    assert [found[f"share_of_gain{end}"] for end in ("", "_low", "_high")] == [None] * 3
    assert found["objective_optimum"] == pytest.approx(0.3, abs=1e-6)
    one_differs = same.clone()
    one_differs[0, 0] = 1.0  # some samples of the prompts lack this one
    assert objectives(one_differs, same, kl, beta, samples=50, seed=1)["share_of_gain"] is None
    all_differ = same + torch.tensor([0.0, 0.1, 0.2, 0.3])
    whole = objectives(all_differ, all_differ.amax(dim=1, keepdim=True).expand(6, 4), 0 * kl, 0.0, 50, 1)
    assert whole["share_of_gain"] == pytest.approx(1.0)


@given(st.lists(REWARD, min_size=2, max_size=8), st.floats(0.05, 5), st.integers(0, 10**6))
def test_no_policy_over_the_samples_does_better(rewards: list[float], beta: float, seed: int) -> None:
    """Over K equally likely responses, J* bounds every policy and the tilted one reaches it."""
    table = torch.tensor([rewards], dtype=torch.float64)
    best = closed_form(table, beta).item()

    def value(chances: torch.Tensor) -> float:
        kl = (chances * (chances * len(rewards)).clamp_min(1e-300).log()).sum()
        return ((chances * table[0]).sum() - beta * kl).item()

    assert value(torch.softmax(table[0] / beta, dim=0)) == pytest.approx(best, abs=1e-9)
    generator = torch.Generator().manual_seed(seed)
    for scale in (0.1, 1.0, 10.0):
        logits = scale * torch.randn(len(rewards), generator=generator, dtype=torch.float64)
        assert value(torch.softmax(logits, dim=0)) <= best + 1e-9
    assert table.mean().item() - 1e-9 <= best <= max(rewards) + 1e-9


def test_few_samples_put_the_optimum_too_low_never_too_high_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = two_outcomes(bad=0.5, reward_bad=0.0, reward_good=1.0, beta=0.2).objective
    estimates = {
        samples: closed_form(torch.randint(2, (20_000, samples), generator=generator).float(), 0.2)
        .mean()
        .item()
        for samples in (4, 16, 256)
    }
    assert estimates[4] < estimates[16] < estimates[256] < truth
    assert estimates[256] == pytest.approx(truth, abs=2e-3)
    # What the docstring says of the bias: β·Var / (2K·mean²), e^{r/β} being 1 or e⁵ here.
    mean, variance = (1 + math.e**5) / 2, ((math.e**5 - 1) / 2) ** 2
    assert truth - estimates[256] == pytest.approx(0.2 * variance / (2 * 256 * mean**2), rel=0.2)


def test_objective() -> None:
    assert objective(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.5]), beta=0.2).item() == pytest.approx(0.3)
