"""The stage `distill`: its losses, its students of both families, and that it survives a kill."""

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compress_stages import STUDENT, distill_section, with_dense
from lm_stages import Workplace
from lm_toys import COMPUTE, FAMILIES, context, toy, unsaved
from torch import Tensor

from tasks.compress.distillation import SoftTargets, distillation_loss, soft_loss, soft_targets, state_loss
from tasks.compress.low_rank import low_rank
from tasks.compress.shrink import from_scratch, narrower_heads
from tasks.compress.sparse import input_norms
from tasks.compress.student import Weights, _lesson, _StudentTrainer
from tasks.compress.teacher import Foreseen, foresee
from tasks.distill import Params, distill
from tasks.lm.collate import collate
from tasks.lm.model import LanguageModel, load
from tasks.lm.respond import hidden_states, response_logits
from tasks.lm.structure import with_layers
from tasks.lm.train import Pair
from tasks.stage import DataError, ParamsError
from tasks.stage.params import validate


def logits(rows: int = 6, size: int = 20, seed: int = 0) -> Tensor:
    return torch.randn((rows, size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T²·KL over all tokens, from torch's own loss."""
    chances = [(each / temperature).log_softmax(-1) for each in (student, teacher)]
    return temperature**2 * F.kl_div(*chances, log_target=True, reduction="sum")


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_with_all_tokens_by_name_the_soft_loss_is_the_divergence(temperature: float) -> None:
    teacher, student = logits(), logits(seed=1)
    found = soft_loss(student, soft_targets(teacher, temperature, None), temperature)
    assert found.item() == pytest.approx(divergence(teacher, student, temperature).item(), rel=1e-5)


def test_nothing_is_to_be_learnt_from_oneself() -> None:
    for top_k in (None, 3):
        student = logits().requires_grad_()
        loss = soft_loss(student, soft_targets(student.detach(), 2.0, top_k), 2.0)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == pytest.approx(0, abs=1e-5)
        assert gradient.abs().max() < 1e-5


def test_the_fewer_tokens_by_name_the_less_of_the_divergence_is_seen() -> None:
    teacher, student = logits(), logits(seed=1)
    found = [soft_loss(student, soft_targets(teacher, 2.0, top_k), 2.0).item() for top_k in (1, 3, 10, 19, 20)]
    assert found[:-1] == sorted(found[:-1])
    assert found[0] < 0.9 * found[-1]
    assert found[-2] == pytest.approx(found[-1], rel=1e-5)  # all but one by name: the other is known too


def test_the_rest_is_the_chance_of_all_other_tokens() -> None:
    targets = soft_targets(logits(), 2.0, 4)
    assert targets.logprobs.exp().sum(dim=-1).tolist() == pytest.approx([1.0] * 6, rel=1e-6)
    chances = (logits() / 2).softmax(-1)
    for row in range(6):
        others = 1 - chances[row, targets.ids[row]].sum()
        assert targets.logprobs[row, -1].exp().item() == pytest.approx(others.item(), rel=1e-5)


def test_at_a_high_temperature_the_gradient_is_the_gap_of_the_logits() -> None:
    """arXiv 1503.02531 eq. 4, times T²: (z − v) / N, for logits of mean 0."""
    teacher, student = (each - each.mean(dim=-1, keepdim=True) for each in (logits(), logits(seed=1)))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(teacher, student, 1e4), student)
    torch.testing.assert_close(gradient, (student - teacher).detach() / 20, rtol=1e-2, atol=1e-3)
    (ours,) = torch.autograd.grad(soft_loss(student, soft_targets(teacher, 100.0, None), 100.0), student)
    torch.testing.assert_close(ours, (student - teacher).detach() / 20, rtol=0.1, atol=0.03)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_weighs_the_teacher_against_the_labels(alpha: float) -> None:
    teacher, student, labels = logits(), logits(seed=1), torch.arange(6)
    found = distillation_loss(student, labels, soft_targets(teacher, 2.0, None), alpha, 2.0)
    hard = F.cross_entropy(student, labels, reduction="sum")
    expected = alpha * divergence(teacher, student, 2.0) + (1 - alpha) * hard
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_token_without_a_chance_teaches_nothing_and_spoils_nothing() -> None:
    teacher = logits(1)
    teacher[0, 3] = float("-inf")
    student = logits(1, seed=1).requires_grad_()
    loss = soft_loss(student, soft_targets(teacher, 1.0, None), 1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert math.isfinite(loss.item())
    assert gradient.isfinite().all()


def pairs_of(lm: LanguageModel, count: int = 7) -> list[Pair]:
    draw = np.random.default_rng(4)
    end = lm.tokenizer.eos_token_id
    return [
        (draw.integers(5, 300, 3 + row).tolist(), [*draw.integers(5, 300, 1 + row % 3).tolist(), end])
        for row in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_down_is_what_the_teacher_foresees(family: str, tmp_path: Path) -> None:
    teacher = toy(family)
    pairs = pairs_of(teacher)
    told: list[int] = []

    def foreseen() -> Foreseen:
        return foresee(
            teacher, pairs, 2.0, 8, tmp_path / "x", keep_states=True, batch_size=3, progress=told.append
        )

    found = foreseen()
    assert sum(told) == len(pairs)
    for rows in ([0], [5, 2], list(range(7))):
        targets = found.of(rows)
        expected = [
            soft_targets(response_logits(teacher, collate(teacher, [prompt], [response]))[0], 2.0, 8)
            for prompt, response in (pairs[row] for row in rows)
        ]
        torch.testing.assert_close(
            targets.logprobs, torch.cat([each.logprobs for each in expected]), rtol=1e-3, atol=1e-4
        )
        assert (targets.ids == torch.cat([each.ids for each in expected])).float().mean() > 0.9  # but for ties
        batch = collate(teacher, *zip(*(pairs[row] for row in rows), strict=True))
        states = found.states(rows, batch)
        assert states is not None
        for kept, wanted, mask in zip(
            states, hidden_states(teacher, batch), (batch.prompt_mask, batch.response_mask), strict=True
        ):
            torch.testing.assert_close(kept, wanted * mask.unsqueeze(-1), rtol=1e-3, atol=1e-4)
    again = foreseen()
    assert sum(told) == len(pairs)
    assert np.array_equal(again.logprobs, found.logprobs)


@pytest.mark.parametrize(("states", "kept"), [(0.0, False), (2.0, False), (2.0, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_batch_is_the_mean_over_its_response_tokens(
    family: str, states: float, kept: bool, tmp_path: Path
) -> None:
    teacher, student = toy(family), toy(family, seed=1)
    pairs, rows = pairs_of(teacher), [4, 1, 6]
    found = foresee(
        teacher, pairs, 2.0, None, tmp_path / "x", keep_states=kept, batch_size=3, progress=lambda _: None
    )
    inputs = _lesson(student, pairs, found, rows)
    counted = int((inputs["labels"] != -100).sum())
    trainer = _StudentTrainer.__new__(_StudentTrainer)
    trainer._student, trainer._teacher = student, None if kept else teacher  # which is not asked again
    trainer._weights = Weights(alpha=0.3, temperature=2.0, states=states)
    trainer.accelerator = type("One", (), {"num_processes": 1})()
    loss = trainer.compute_loss(student.model, inputs, num_items_in_batch=counted)
    expected = 0.0
    for prompt, response in (pairs[row] for row in rows):
        batch = collate(teacher, [prompt], [response])
        theirs, ours = response_logits(teacher, batch)[0], response_logits(student, batch)[0]
        hard = F.cross_entropy(ours, torch.tensor(response), reduction="sum")
        expected += (0.3 * divergence(theirs, ours, 2.0) + 0.7 * hard).item()
        for wanted, made in zip(*(states_of(lm, prompt, response) for lm in (teacher, student)), strict=True):
            expected += states * len(response) * ((made - wanted).norm() / wanted.norm()).item() ** 2
    assert loss.item() == pytest.approx(expected / counted, rel=1e-4)


def states_of(lm: LanguageModel, prompt: Sequence[int], response: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What is made of a prompt, and what each token of the response is predicted from."""
    if lm.is_encoder_decoder:
        read = lm.model.get_encoder()(torch.tensor([prompt])).last_hidden_state
        start = lm.model.config.decoder_start_token_id
        said = torch.tensor([[start, *response[:-1]]])
        return read, lm.model.get_decoder()(said, encoder_hidden_states=read).last_hidden_state
    found = lm.model.get_decoder()(torch.tensor([[*prompt, *response]])).last_hidden_state
    return found[:, : len(prompt)], found[:, len(prompt) - 1 : -1]


def test_states_are_apart_by_shares_of_their_size() -> None:
    teacher, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert state_loss(teacher, teacher, mask).tolist() == [0, 0]
    assert state_loss(1.5 * teacher, teacher, mask).tolist() == pytest.approx([0.25, 0.25])
    noise = torch.zeros(2, 3, 4)
    noise[1, 1:] = 9.0  # where nothing stands
    assert state_loss(teacher + noise, teacher, mask).tolist() == [0, 0]


def called(root: Path, **changes: Any) -> Mapping[str, Any]:
    """The stage as a function, in the folder `root`."""
    section = distill_section(**{"teacher": {"source": str(root / "models/ppo"), "revision": None}, **changes})
    section["schedule"] = unsaved(section["schedule"])
    data = root / "data" / "examples"
    return distill(
        validate(section, "distill", Params),
        data / "train.jsonl",
        data / "validation.jsonl",
        root / "models" / "distill",
        root / "reports" / "distill",
        context(root, "distill"),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_smaller_learns_and_opens_without_our_code(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    here = with_dense(tmp_path, family)
    schedule_here = {**distill_section()["schedule"], "epochs": 6}
    metrics = called(here.root, schedule=schedule_here, control={"examples": 16, "epochs": 2})
    assert metrics["loss_after"] < metrics["loss_before"] - 0.1
    assert metrics["parameters_ratio"] == metrics["parameters"] / metrics["parameters_teacher"] < 0.75
    assert metrics["bytes"] == 4 * metrics["parameters"]
    for suffix in ("", "_teacher", "_taught", "_untaught"):
        assert 0 <= metrics[f"rougeL{suffix}"] <= 1
        assert 0 <= metrics[f"toxicity_rate{suffix}"] <= 1
    opened = load(here.root / "models" / "distill", COMPUTE)
    family_class = AutoModelForSeq2SeqLM if opened.is_encoder_decoder else AutoModelForCausalLM
    plain = family_class.from_pretrained(here.root / "models" / "distill")
    assert sum(each.numel() for each in plain.parameters()) == metrics["parameters"]
    summary = (here.root / "reports" / "distill" / "summary.md").read_text()
    assert "student of few examples, from their references alone" in summary
    assert not (tmp_path / "work" / "foreseen").exists()


def test_the_adapter_of_a_teacher_is_merged(tmp_path: Path) -> None:
    from tasks.lm.model import save
    from tasks.lm.peft import adapt

    here = with_dense(tmp_path, "t5")
    base = load(here.root / "models" / "ppo", COMPUTE, trainable=True)
    options = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": None}
    save(adapt(base, "lora", options), here.root / "models" / "adapter")
    plain = called(here.root)
    assert called(here.root, teacher={"source": str(here.root / "models/adapter"), "revision": None}) == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_from_scratch_may_be_narrower(family: str, tmp_path: Path) -> None:
    here = with_dense(tmp_path, family)
    soft = {**distill_section()["soft"], "states": 0.0}
    metrics = called(here.root, student={**STUDENT, "start": "scratch", "width": 16}, soft=soft)
    assert load(here.root / "models" / "distill", COMPUTE).model.config.hidden_size == 16
    assert metrics["parameters_ratio"] < 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_from_scratch_a_student_of_the_same_size_has_the_shapes_of_its_teacher(family: str) -> None:
    teacher = toy(family, layers=2)
    same = {"width": None, "encoder": None, "decoder": None, "heads": None, "head_size": None, "channels": None}
    student = from_scratch(teacher, **same)
    shapes = [{n: t.shape for n, t in lm.model.state_dict().items()} for lm in (teacher, student)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_spread_evenly_and_one_is_the_last(family: str) -> None:
    teacher = toy(family, layers=3)
    whole = with_layers(teacher, None, None)
    assert all(
        torch.equal(tensor, whole.model.state_dict()[name])
        for name, tensor in teacher.model.state_dict().items()
    )
    two = with_layers(teacher, None, 2)
    stack = "decoder.block" if family == "t5" else "model.layers"
    given, kept = (lm.model.state_dict() for lm in (teacher, two))
    for new, old in ((0, 0), (1, 2)):
        names = [name for name in kept if name.startswith(f"{stack}.{new}.") and "relative" not in name]
        assert names
        assert all(
            torch.equal(kept[name], given[name.replace(f"{stack}.{new}", f"{stack}.{old}")]) for name in names
        )
    last = with_layers(teacher, 1, 1).model.state_dict()
    name = (
        "decoder.block.{}.layer.0.SelfAttention.q.weight"
        if family == "t5"
        else "model.layers.{}.mlp.up_proj.weight"
    )
    assert torch.equal(last[name.format(0)], given[name.format(2)])
    if family == "t5":  # only the first layer has what all know of positions
        bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        assert torch.equal(last[bias], given[bias])


def of_rank(rank: int, rows: int = 7, columns: int = 5, seed: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)


def test_the_product_of_lower_rank_is_the_nearest_there_is() -> None:
    left, right = of_rank(4)
    ones = torch.ones(7), torch.ones(5)
    whole = torch.mm(*low_rank(left, right, 4, *ones))
    torch.testing.assert_close(whole, left @ right)
    values = torch.linalg.svdvals(left @ right)
    for rank in (1, 2, 3):
        narrow = low_rank(left, right, rank, *ones)
        assert [each.shape for each in narrow] == [(7, rank), (rank, 5)]
        apart = (torch.mm(*narrow) - left @ right).square().sum()
        torch.testing.assert_close(apart, values[rank:].square().sum())  # Eckart & Young


def test_what_is_large_is_kept_and_what_is_never_seen_is_given_up() -> None:
    left, right = of_rank(3)
    norms = torch.tensor([9.0, 1, 1, 0.1, 0.1, 0.1, 0.1]), torch.tensor([0.0, 5, 1, 1, 0.0])

    def apart(narrow: tuple[Tensor, Tensor]) -> Tensor:
        gaps = torch.mm(*narrow) - left @ right
        return (norms[0].unsqueeze(1) * gaps * norms[1]).square().sum()

    weighted = low_rank(left, right, 2, *norms)
    assert apart(weighted) < 0.9 * apart(low_rank(left, right, 2, torch.ones(7), torch.ones(5)))
    assert all(each.isfinite().all() for each in weighted)
    seen = low_rank(left, right, 2, torch.ones(7), torch.tensor([1.0, 1, 0, 0, 0]))
    torch.testing.assert_close(torch.mm(*seen)[:, :2], (left @ right)[:, :2], rtol=1e-4, atol=1e-4)


def test_narrower_heads_do_as_nearly_as_they_can_what_they_did() -> None:
    teacher = toy("t5", layers=2)
    pairs = pairs_of(teacher)
    norms = input_norms(teacher, pairs)
    batch = collate(teacher, *zip(*pairs, strict=True))
    wanted = response_logits(teacher, batch)
    size = teacher.model.config.d_kv
    torch.testing.assert_close(
        response_logits(narrower_heads(teacher, size, norms), batch), wanted, rtol=1e-3, atol=1e-4
    )
    apart = [
        (response_logits(narrower_heads(teacher, narrow, norms), batch) - wanted).norm().item()
        for narrow in range(1, size)
    ]
    assert apart[0] > apart[-1] > 0
    half = narrower_heads(teacher, size // 2, norms).model
    assert half.config.num_heads == teacher.model.config.num_heads
    assert half.encoder.block[0].layer[0].SelfAttention.q.weight.shape == (
        teacher.model.config.num_heads * size // 2,
        teacher.model.config.d_model,
    )


def test_a_student_with_narrower_heads_opens_without_our_code(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    here = with_dense(tmp_path, "t5")
    metrics = called(here.root, student={**STUDENT, "head_size": 4})
    plain = AutoModelForSeq2SeqLM.from_pretrained(here.root / "models" / "distill")
    assert (plain.config.d_kv, plain.config.num_heads) == (4, 2)
    assert sum(each.numel() for each in plain.parameters()) == metrics["parameters"]
    scratch = called(
        here.root, student={**STUDENT, "start": "scratch", "head_size": 4}, soft=distill_section()["soft"]
    )
    assert scratch["parameters"] == metrics["parameters"]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_on_its_own_answers_a_causal_student_comes_nearer_to_its_teacher(share: float, tmp_path: Path) -> None:
    here = with_dense(tmp_path, "llama")
    on_policy = {"share": share, "beta": 0.5, "temperature": 1.0}
    schedule_here = {**distill_section()["schedule"], "epochs": 4}
    metrics = called(here.root, method="on_policy", on_policy=on_policy, schedule=schedule_here)
    assert metrics["loss_after"] < metrics["loss_before"] - 0.1
    first = (here.root / "models" / "distill" / "model.safetensors").read_bytes()
    again = called(here.root, method="on_policy", on_policy=on_policy, schedule=schedule_here)
    assert again == metrics
    assert (here.root / "models" / "distill" / "model.safetensors").read_bytes() == first


def test_killed_and_run_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    with_dense(tmp_path / "ground", "t5")
    whole, killed = (Workplace(tmp_path / name) for name in ("whole", "killed"))
    for workplace in (whole, killed):
        shutil.copytree(tmp_path / "ground", workplace.root)
        workplace.set(distill=distill_section(examples=80))
    whole.run("distill")
    process = killed.start("distill")
    end = time.monotonic() + 100
    while not list((killed.root / ".work" / "distill").glob("*/student/checkpoint-*/manifest.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    process.communicate()
    killed.run("distill")
    assert killed.outputs("distill") == whole.outputs("distill")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": "sing"}, DataError, "no example of sing, which is distill.task"),
        ({"student": {**STUDENT, "decoder": 3}}, ParamsError, "decoder.block has 2 layers, and 3 are wanted"),
        (
            {"method": "on_policy"},
            ParamsError,
            "on_policy is for causal models, and t5 has an encoder; set it to soft",
        ),
        ({"student": {**STUDENT, "heads": 5}}, ParamsError, "5 heads are wanted of 4 in each layer"),
        (
            {"student": {**STUDENT, "start": "scratch", "width": 16}},
            ParamsError,
            "soft.states compares states of one width, but .* is 32 wide; set soft.states to 0",
        ),
        ({"student": {**STUDENT, "width": 16}}, ParamsError, "width is 16, but .* 32 wide; set it to null"),
        (
            {"student": {**STUDENT, "head_size": 9}},
            ParamsError,
            "9 wide are wanted of heads 8 wide; ask for less",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    here = with_dense(tmp_path, "t5")
    with pytest.raises(error, match=message) as caught:
        called(here.root, **changes)
    assert "\n" not in str(caught.value)


def test_heads_that_rotate_cannot_be_narrower(tmp_path: Path) -> None:
    here = with_dense(tmp_path, "llama")
    with pytest.raises(ParamsError, match=r"heads of a llama cannot be made narrower, .*head_size to null"):
        called(here.root, student={**STUDENT, "encoder": None, "head_size": 4})


def test_targets_are_what_the_loss_takes() -> None:
    targets = soft_targets(logits(), 1.0, 100)
    assert isinstance(targets, SoftTargets)
    assert targets.ids.shape == (6, 20)
    assert targets.logprobs.shape == (6, 21)
    assert (targets.logprobs[:, -1] == float("-inf")).all()
