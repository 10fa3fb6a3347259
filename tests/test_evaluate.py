"""The stage `evaluate` on toy models of both families: what it writes, that it repeats, and how it refuses."""

import csv
import random
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lm_stages import Workplace

from tasks.data.records import read_examples
from tasks.data.synthetic import examples as synthetic
from tasks.data.synthetic import is_toxic
from tasks.evaluate import Params, chosen, evaluate, sample_answers, shot_prompts
from tasks.stage import Compute, Context, DataError, NullTrack, ParamsError
from tasks.stage.params import read_section, read_yaml, stages_of, validate

COMPUTE = {"device": "cpu", "precision": "fp32", "threads": 1, "processes": 1, "accelerate": None}
SECTION: dict[str, Any] = {
    "task": "summarize",
    "tuned": "finetune",
    "variants": {
        "base": {"model": "base", "shots": 0},
        "base_few_shot": {"model": "base", "shots": 2},
        "finetune": {"model": "finetune", "shots": 0},
    },
    "examples": {"main_task": 24, "other_tasks": 8, "decoding": 6},
    "generation": {"do_sample": False, "num_beams": 1, "max_new_tokens": 12},
    "decoding": {
        "greedy": {"do_sample": False},
        "top_k": {"do_sample": True, "top_k": 5},
        "beams": {"num_beams": 2},
    },
    "batch_size": 8,
    "engine": None,
    "max_prompt_tokens": 300,
    "toxicity": {"backend": "oracle"},
    "alignment": None,
    "bootstrap_samples": 50,
    "sample_rows": 3,
}
ALIGNMENT: dict[str, Any] = {
    "before": "base",
    "after": "finetune",
    "examples": 20,
    "samples": 2,
    "generation": {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 6},
    "reward": None,
}
SCORES = (
    *("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "exact_match", "slot_f1"),
    *("perplexity", "toxicity_rate", "toxicity_mean", "length_ratio"),
)


class Recorder(NullTrack):
    """Remembers tables and figures."""

    def __init__(self) -> None:
        self.tables: dict[str, Any] = {}
        self.figures: list[str] = []
        self.datasets: list[tuple[str, int]] = []

    def table(self, name: str, rows: Any) -> None:
        self.tables[name] = rows

    def figure(self, name: str, path: Path) -> None:
        assert path.is_file()
        self.figures.append(name)

    def dataset(self, name: str, path: Path, digest: str, rows: int) -> None:
        self.datasets.append((name, rows))


def params(**changes: Any) -> Params:
    return validate(SECTION | changes, "evaluate", Params)


def context(folder: Path, track: NullTrack | None = None) -> Context:
    return Context("evaluate", 7, Compute(**COMPUTE), folder / "work", track or NullTrack())


def toy_tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def toy_model(family: str, tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    size, ids = len(tokenizer), {"pad_token_id": 0, "eos_token_id": 1}
    if family == "seq2seq":
        layers = {"num_layers": 1, "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32}
        return T5ForConditionalGeneration(T5Config(vocab_size=size, decoder_start_token_id=0, **layers, **ids))
    layers = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 512}
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, bos_token_id=1, **layers, **ids))


def lay_out(folder: Path, family: str) -> Path:
    """Data and two untrained models as the stages before this one leave them."""
    from tasks.lm.model import LanguageModel, save

    rows = list(synthetic(3, 60))
    parts = {"train": rows[:60], "test": rows[60:]}
    (folder / "data" / "examples").mkdir(parents=True)
    for name, part in parts.items():
        lines = "".join(example.line() + "\n" for example in part)
        (folder / "data" / "examples" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = toy_tokenizer([example.prompt for example in rows])
    for seed, name in enumerate(("base", "finetune")):
        save(LanguageModel(toy_model(family, tokenizer, seed), tokenizer), folder / "models" / name)
    return folder


@pytest.fixture(scope="module", params=["seq2seq", "causal"])
def workplace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("one"), "seq2seq")


def run(folder: Path, report: Path, track: NullTrack | None = None, **changes: Any) -> dict[str, Any]:
    return evaluate(
        params(**changes), folder / "data" / "examples", folder / "models", report, context(folder, track)
    )


def test_scores_of_every_variant_baseline_task_and_setting(workplace: Path, tmp_path: Path) -> None:
    track = Recorder()
    metrics = run(workplace, tmp_path / "report", track)
    numbers = {key for name in SCORES for key in (name, f"{name}_low", f"{name}_high")} | {"distinct_2"}
    without_model = {name for name in numbers if not name.startswith("perplexity")}
    for name in SECTION["variants"]:
        assert set(metrics[name]) == numbers
        for score in SCORES:
            low, value, high = (metrics[name][key] for key in (f"{score}_low", score, f"{score}_high"))
            assert 0 <= low <= high
            assert score in ("perplexity", "length_ratio") or 0 <= value <= high <= 1
        assert metrics[name]["perplexity"] > 1
    assert metrics["base"]["perplexity"] != metrics["base_few_shot"]["perplexity"]
    assert set(metrics["baselines"]) == {"lead_1", "longest_turn", "nearest_summary"}
    assert all(set(scores) == without_model for scores in metrics["baselines"].values())
    assert list(metrics["decoding"]) == ["beams", "greedy", "top_k"]
    assert all(set(scores) == without_model for scores in metrics["decoding"].values())
    assert set(metrics["tasks"]) == {"base", "finetune"}
    assert list(metrics["tasks"]["base"]) == ["act", "slot", "summarize"]
    assert metrics["tasks"]["finetune"]["summarize"]["rougeL"] == metrics["finetune"]["rougeL"]
    assert set(metrics["differences"]) == {"base", "base_few_shot", "lead_1", "longest_turn", "nearest_summary"}
    lead = metrics["differences"]["lead_1"]
    assert lead["rougeL"] == pytest.approx(
        metrics["finetune"]["rougeL"] - metrics["baselines"]["lead_1"]["rougeL"], abs=2e-6
    )
    assert metrics["about"]["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")

    assert [sorted(row) for row in track.tables["samples"]] == [
        ["base", "base_few_shot", "finetune", "prompt", "reference"]
    ] * SECTION["sample_rows"]
    assert track.figures == ["scores", "tasks"]
    assert track.datasets == [("test", 120)]


def test_the_same_again_gives_the_same_bytes(seq2seq: Path, tmp_path: Path) -> None:
    first, again = run(seq2seq, tmp_path / "first"), run(seq2seq, tmp_path / "again")
    assert first == again
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == [
        *("alignment.png", "decoding.csv", "samples.jsonl", "scores.csv", "scores.png", "summary.md"),
        *("tasks.csv", "tasks.png"),
    ]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_report_says_what_the_metrics_say(seq2seq: Path, tmp_path: Path) -> None:
    metrics = run(seq2seq, tmp_path / "report")
    with (tmp_path / "report" / "scores.csv").open(newline="") as lines:
        rows = {row["variant"]: row for row in csv.DictReader(lines)}
    assert float(rows["finetune"]["perplexity"]) == metrics["finetune"]["perplexity"]
    assert float(rows["nearest_summary"]["rougeL"]) == metrics["baselines"]["nearest_summary"]["rougeL"]
    assert float(rows["nearest_summary"]["bleu"]) == metrics["baselines"]["nearest_summary"]["bleu"]
    summary = (tmp_path / "report" / "summary.md").read_text()
    assert metrics["about"]["bleu_signature"] in summary
    assert f"| nearest_summary | {metrics['baselines']['nearest_summary']['rouge1']:.3f} |" in summary


def test_baselines_are_what_they_say(seq2seq: Path, tmp_path: Path) -> None:
    metrics = run(seq2seq, tmp_path / "report")
    rows = read_examples(seq2seq / "data" / "examples" / "test.jsonl")
    main = chosen(rows, params())["summarize"]
    from tasks.metrics.measures import quality

    leads = [example.input.splitlines()[0] for example in main]
    expected = quality(leads, [example.outputs for example in main], [example.slots for example in main])
    for name in ("rougeL", "slot_f1", "bleu"):
        assert metrics["baselines"]["lead_1"][name] == pytest.approx(expected[name].value, abs=1e-6)
    assert metrics["baselines"]["nearest_summary"]["rougeL"] > metrics["baselines"]["lead_1"]["rougeL"]


def test_the_choice_of_examples_is_fixed_by_their_ids() -> None:
    rows = list(synthetic(1, 60))
    first = chosen(rows, params())
    random.Random(0).shuffle(rows)
    assert chosen(rows, params()) == first
    assert {task: len(part) for task, part in first.items()} == {"summarize": 24, "act": 8, "slot": 8}
    everything = {"main_task": None, "other_tasks": None, "decoding": None}
    assert [len(part) for part in chosen(rows, params(examples=everything)).values()] == [60, 60, 60]


QUICK = {
    "examples": {"main_task": 20, "other_tasks": 1, "decoding": 1},
    "decoding": {"greedy": {}},
    "variants": {name: {"model": name, "shots": 0} for name in ("base", "finetune")},
}


def test_alignment_compares_sampled_answers_before_and_after(workplace: Path, tmp_path: Path) -> None:
    import torch

    from tasks.lm.collate import collate, encode_prompts
    from tasks.lm.model import load
    from tasks.lm.respond import response_logprobs

    track = Recorder()
    without = run(workplace, tmp_path / "without", **QUICK)
    metrics = run(workplace, tmp_path / "report", track, **QUICK, alignment=ALIGNMENT)
    found = metrics.pop("alignment")
    assert metrics == without
    rows = read_examples(workplace / "data" / "examples" / "test.jsonl")
    main = chosen(rows, params(**QUICK))["summarize"]
    rude = [example for example in main if is_toxic(example.prompt)]
    assert (found["before"], found["after"], found["samples"]) == ("base", "finetune", 2)
    assert (found["n"], found["n_rude"]) == (20, len(rude))
    assert 0 < len(rude) < 20
    assert list(found["all"]["before"]) == list(found["rude"]["after"])

    lms = [load(workplace / "models" / name, Compute(**COMPUTE)) for name in ("base", "finetune")]
    prompts = encode_prompts(lms[1], [example.prompt for example in main for _ in range(2)])
    answers = sample_answers(lms[1], prompts, ALIGNMENT["generation"], 8, 7, lambda _: None)
    assert any(first != second for first, second in zip(answers[::2], answers[1::2], strict=True))
    with torch.inference_mode():  # one by one, without padding
        before, after = (
            sum(
                float(response_logprobs(lm, collate(lm, [prompt], [answer])).sum())
                for prompt, answer in zip(prompts, answers, strict=True)
            )
            for lm in lms
        )
    assert found["all"]["kl"] == pytest.approx((after - before) / 40, abs=1e-4)
    assert found["all"]["kl"] > 0

    assert track.figures == ["scores", "tasks", "alignment"]
    summary = (tmp_path / "report" / "summary.md").read_text()
    assert "## Alignment" in summary
    assert f"| {len(rude)} rude prompts | Slot-F1 | {found['rude']['before']['slot_f1']:.3f} [" in summary
    drawn = [(tmp_path / name / "alignment.png").read_bytes() for name in ("report", "without")]
    assert drawn[0] != drawn[1]


def test_a_variant_aligned_with_itself_has_not_moved(workplace: Path, tmp_path: Path) -> None:
    twins = {name: {"model": "finetune", "shots": 0} for name in ("finetune", "twin")}
    section = ALIGNMENT | {"before": "finetune", "after": "twin", "examples": None}
    found = run(workplace, tmp_path / "report", **QUICK | {"variants": twins}, alignment=section)["alignment"]
    for part in ("all", "rude"):
        assert found[part]["kl"] == 0
        assert set(found[part]["difference"].values()) == {0}
        assert found[part]["before"] == found[part]["after"]


def test_the_reward_model_scores_both_sides(
    seq2seq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def scores(classifier: Path, prompts: Any, answers: Any, *, batch_size: int) -> list[float]:
        asked.append((classifier.name, len(prompts), len(answers), batch_size))
        return [float(len(asked))] * len(answers)

    module = ModuleType("tasks.lm.classifier")
    vars(module).update(load_classifier=lambda folder, compute: folder, scores=scores)
    monkeypatch.setitem(sys.modules, "tasks.lm.classifier", module)
    section = ALIGNMENT | {"reward": "reward"}
    with pytest.raises(DataError, match=r"models/reward is missing: .*alignment\.reward to null"):
        run(seq2seq, tmp_path / "report", **QUICK, alignment=section)
    clone = shutil.copytree(seq2seq, tmp_path / "clone")
    (clone / "models" / "reward").mkdir()
    found = run(clone, tmp_path / "report", **QUICK, alignment=section)["alignment"]
    assert asked == [("reward", 40, 40, 8)] * 2
    assert found["rude"]["difference"]["reward"] in (1, -1)
    assert "| Reward |" in (tmp_path / "report" / "summary.md").read_text()


def test_shots_that_do_not_fit_are_left_out_from_the_front() -> None:
    from tasks.lm.collate import encode_prompts
    from tasks.lm.model import LanguageModel

    rows = [example for example in synthetic(1, 20) if example.task == "summarize"]
    tokenizer = toy_tokenizer([example.prompt for example in rows])
    lm = LanguageModel(toy_model("seq2seq", tokenizer, 0), tokenizer)
    shots, asked = rows[:3], rows[3:]
    lengths = [len(ids) for ids in encode_prompts(lm, shot_prompts(lm, asked, shots[1:], 10_000))]
    limit = sorted(lengths)[len(asked) // 2]  # two shots fit for half of them
    prompts = shot_prompts(lm, asked, shots, limit)
    used = []
    for prompt, example in zip(prompts, asked, strict=True):
        assert prompt.endswith(example.prompt)
        kept = [shot for shot in shots if f"{shot.prompt}\n{shot.reference}\n\n" in prompt]
        assert kept == shots[len(shots) - len(kept) :]
        assert len(encode_prompts(lm, [prompt])[0]) <= limit
        used.append(len(kept))
    assert 1 <= min(used) < max(used) <= 3
    assert shot_prompts(lm, asked, shots, 10_000)[0].count("\n\n") > prompts[0].count("\n\n")


def test_toxicity_by_a_classifier(seq2seq: Path, tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = toy_tokenizer([example.prompt for example in synthetic(3, 60)])
    labels = {"kind": 0, "rude": 1}
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        label2id=labels,
        id2label={index: label for label, index in labels.items()},
    )
    model = BertForSequenceClassification(config)
    folder = tmp_path / "classifier"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    backend = {
        "backend": "classifier",
        "source": str(folder),
        "revision": None,
        "label": "rude",
        "toxic_from": 0.5,
    }

    metrics = run(seq2seq, tmp_path / "report", toxicity=backend)
    lead = metrics["baselines"]["lead_1"]
    rows = read_examples(seq2seq / "data" / "examples" / "test.jsonl")
    leads = [example.input.splitlines()[0] for example in chosen(rows, params())["summarize"]]
    with torch.inference_mode():
        chances = [
            float(model.eval()(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 1])
            for text in leads
        ]
    assert lead["toxicity_mean"] == pytest.approx(sum(chances) / len(chances), abs=1e-5)
    assert lead["toxicity_rate"] == pytest.approx(
        sum(chance >= 0.5 for chance in chances) / len(chances), abs=1e-6
    )

    with pytest.raises(ParamsError, match="no label 'hate'; it has kind, rude"):
        run(seq2seq, tmp_path / "report", toxicity=backend | {"label": "hate"})
    with pytest.raises(ParamsError, match=r"toxicity\.source: cannot open .*nowhere"):
        run(seq2seq, tmp_path / "report", toxicity=backend | {"source": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"task": "translate"}, DataError, "evaluate.task is translate, but .*: act, slot, summarize"),
        (
            {"variants": {"finetune": {"model": "ppo", "shots": 0}}},
            DataError,
            "models/ppo is missing.*take finetune out",
        ),
        (
            {"variants": SECTION["variants"] | {"many": {"model": "base", "shots": 99}}},
            DataError,
            "99 shots, but only 20 train",
        ),
        (
            {"decoding": {"warm": {"temprature": 2}}},
            ParamsError,
            "decoding.warm.temprature .*did you mean temperature",
        ),
        ({"generation": {"max_new_tokens": 0}}, ParamsError, "evaluate.generation: .*max_new_tokens"),
        (
            {"alignment": ALIGNMENT | {"generation": {"do_sample": True, "topk": 0}}},
            ParamsError,
            "evaluate.alignment.generation.topk .*did you mean top_k",
        ),
    ],
)
def test_wrong_use_is_one_line_before_any_model_is_opened(
    seq2seq: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        run(seq2seq, tmp_path / "report", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tuned": "finetuned"}, "tuned is finetuned, which is none of the variants"),
        (
            {"variants": {"finetune": {"model": "m", "shots": 0}, "tasks": {"model": "m", "shots": 0}}},
            "tasks is a part",
        ),
        ({"tuned": "base_few_shot"}, "tuned is base_few_shot, which has shots"),
        ({"variants": {"finetune": {"model": "m", "shots": -1}}}, "variants.finetune.shots: found -1"),
        ({"toxicity": {"backend": "oracles"}}, "did you mean oracle"),
        ({"toxicity": {"backend": "oracle", "label": "rude"}}, "unknown key"),
        ({"batch": 8}, "unknown key; did you mean batch_size"),
        ({"alignment": ALIGNMENT | {"after": "ppo"}}, "alignment.after is ppo, which is none of the variants"),
        (
            {"alignment": ALIGNMENT | {"before": "base_few_shot"}},
            "before is base_few_shot, which has",
        ),
        ({"alignment": ALIGNMENT | {"after": "base"}}, "before and after are both base"),
        ({"alignment": ALIGNMENT | {"generation": {}}}, "generation with do_sample: true"),
    ],
)
def test_a_wrong_section_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ParamsError, match=re.escape(words)) as caught:
        params(**changes)
    assert "\n" not in str(caught.value)


def test_the_command_writes_metrics_and_report(seq2seq: Path, tmp_path: Path) -> None:
    workplace = Workplace(Path(shutil.copytree(seq2seq, tmp_path / "clone")))
    quick = {"examples": {"main_task": 6, "other_tasks": 2, "decoding": 2}, "decoding": {"greedy": {}}}
    workplace.set(evaluate=SECTION | quick)
    workplace.run("evaluate")
    assert workplace.metrics("evaluate")["about"]["examples"] == 6
    assert (workplace.root / "reports" / "evaluate" / "summary.md").is_file()


def test_every_variant_of_the_default_run_is_a_dependency_in_the_graph(repository: Path) -> None:
    section = read_section(read_yaml(repository / "params.yaml"), "evaluate", Params)
    wanted = {f"models/{variant.model}" for variant in section.variants.values()}
    if section.alignment is not None and section.alignment.reward is not None:
        wanted.add(f"models/{section.alignment.reward}")
    deps = stages_of(read_yaml(repository / "dvc.yaml"))["evaluate"]["deps"]
    assert wanted == {dep for dep in deps if dep.startswith("models/")}
