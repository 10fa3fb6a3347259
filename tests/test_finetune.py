"""The stage `finetune` as it is run, on toy sizes: every method learns, is saved whole and survives a kill."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lm_stages import SCHEDULE_HERE, Workplace, finetune_section, lay_out
from lm_toys import COMPUTE, FAMILIES, METHODS, context, toy, unsaved

from tasks.data.records import read_examples
from tasks.finetune import Params, encode, finetune
from tasks.lm.collate import collate
from tasks.lm.model import load, save
from tasks.lm.respond import model_inputs, response_logits
from tasks.lm.train import _ResponseTrainer, _trainer_inputs
from tasks.stage import ParamsError
from tasks.stage.params import validate

ALL = (*METHODS, "qlora")
WHOLE = ("full", "bitfit")  # saved as a full model, not as an adapter


@pytest.fixture(scope="module", params=FAMILIES)
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Data and an untrained base; qlora's kernels on a CPU want widths of 64."""
    workplace = lay_out(tmp_path_factory.mktemp(request.param))
    save(toy(request.param, d_model=64), workplace.root / "models" / "base")
    return workplace


def tune(
    ground: Workplace, method: str, out: Path, monkeypatch: pytest.MonkeyPatch, epochs: int = 3
) -> dict[str, float]:
    """Run the stage's body in this process."""
    monkeypatch.chdir(ground.root)
    torch.manual_seed(1)
    data = Path("data/examples")
    found = finetune(
        validate(
            finetune_section(method, schedule={**unsaved(SCHEDULE_HERE), "epochs": epochs}), "finetune", Params
        ),
        data / "train.jsonl",
        data / "validation.jsonl",
        Path("models/base"),
        out / "model",
        out / "reports",
        context(out, "finetune"),
    )
    return dict(found)


@pytest.mark.parametrize("method", ALL)
def test_every_method_trains_its_parameters_alone_and_learns(
    method: str, ground: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    metrics = tune(ground, method, tmp_path, monkeypatch, epochs=3 if method == "prompt_tuning" else 2)
    assert metrics["loss_after"] < metrics["loss_before"] - 0.004
    assert metrics["trainable_share"] == metrics["trainable_parameters"] / metrics["total_parameters"]
    assert (metrics["trainable_share"] == 1) == (method == "full")
    base, tuned = load("models/base", COMPUTE), load(tmp_path / "model", COMPUTE)
    before = base.model.state_dict()
    if method in WHOLE:
        after = tuned.model.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        assert method == "full" or all("bias" in name or "norm" in name for name in moved)
    else:
        config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "models/base"
        from safetensors.torch import load_file

        saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
        assert sum(tensor.numel() for tensor in saved.values()) == metrics["trainable_parameters"]
    examples = read_examples(Path("data/examples/validation.jsonl"))[:6]
    pairs, _ = encode(tuned, examples, validate(finetune_section(method), "finetune", Params))
    batch = collate(tuned, *zip(*pairs, strict=True))
    with torch.inference_mode():
        first, again, untuned = (
            response_logits(lm, batch) for lm in (tuned, load(tmp_path / "model", COMPUTE), base)
        )
    assert torch.equal(first, again)
    assert (first - untuned).abs().max() > 1e-3


def test_killed_with_its_newest_checkpoint_damaged_it_ends_with_the_same_bytes(
    ground: Workplace, tmp_path: Path
) -> None:
    """The checkpoint before the damaged one is used."""
    whole, killed = (Workplace(tmp_path / name) for name in ("whole", "killed"))
    for workplace in (whole, killed):
        shutil.copytree(ground.root, workplace.root)
        workplace.set(finetune=finetune_section("lora", lora=_lora_with_dropout()))
    whole.run("finetune")
    checkpoints = killed.kill_in_training("finetune")
    assert not (killed.root / "models" / "finetune").exists()
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    weights = next(newest.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-50])
    said = killed.run("finetune")
    assert f"{newest.name} is not used" in said
    assert killed.outputs("finetune") == whole.outputs("finetune")


def _lora_with_dropout() -> dict[str, object]:
    return {**finetune_section("lora")["lora"], "dropout": 0.2}


def test_plain_libraries_open_the_adapter(
    ground: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    tune(ground, "lora", tmp_path, monkeypatch, epochs=1)
    seq2seq = AutoConfig.from_pretrained("models/base").is_encoder_decoder
    bare = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained("models/base")
    model = PeftModel.from_pretrained(bare, tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ours = load(tmp_path / "model", COMPUTE)
    ids = tokenizer("Who asks?", return_tensors="pt")
    wanted = {"decoder_input_ids": torch.zeros((1, 1), dtype=torch.int64)} if seq2seq else {}
    with torch.inference_mode():
        assert torch.equal(model(**ids, **wanted).logits, ours.model(**ids, **wanted).logits)


def test_the_loss_is_on_the_response_alone(ground: Workplace) -> None:
    """What the prompt's own tokens would have been predicted as plays no part; each response token does."""
    lm = load(ground.root / "models" / "base", COMPUTE)
    examples = read_examples(ground.root / "data" / "examples" / "validation.jsonl")[:4]
    pairs, _ = encode(lm, examples, validate(finetune_section("full"), "finetune", Params))
    inputs = _trainer_inputs(lm, pairs)
    assert torch.equal(inputs["labels"], model_inputs(lm, collate(lm, *zip(*pairs, strict=True)))["labels"])
    counted = int((inputs["labels"] != -100).sum())
    assert counted == sum(len(response) for _, response in pairs)
    logits = lm.model(**{k: v for k, v in inputs.items() if "labels" not in k}).logits
    shown = logits[:, : inputs["labels"].shape[1]].log_softmax(dim=-1)
    expected = sum(
        -shown[row, at, token].item()
        for row, (_, response) in enumerate(pairs)
        for at, token in enumerate(response)
    )
    trainer = _ResponseTrainer.__new__(_ResponseTrainer)
    trainer.accelerator = type("One", (), {"num_processes": 1})()
    loss = trainer.compute_loss(lm.model, inputs, num_items_in_batch=counted)
    assert loss.item() == pytest.approx(expected / counted, rel=1e-5)


def test_only_the_tasks_asked_for_are_seen(
    ground: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ground.root)
    params = validate(finetune_section("ia3", tasks=["act"]), "finetune", Params)
    file = Path("data/examples/train.jsonl")
    metrics = finetune(
        params, file, file, Path("models/base"), tmp_path / "m", tmp_path / "r", context(tmp_path)
    )
    assert metrics["examples"] == len(read_examples(file, ["act"])) < len(read_examples(file))


def test_modules_that_are_not_there_are_one_line(ground: Workplace) -> None:
    section = finetune_section("lora")
    section["lora"]["target_modules"] = ["nowhere"]
    ground.set(finetune=section)
    said = ground.run("finetune", code=2)
    assert "Traceback" not in said
    assert "lora on" in said
    assert sum("nowhere" in line for line in said.splitlines()) == 1


def test_a_task_without_examples_is_one_line(ground: Workplace, tmp_path: Path) -> None:
    params = validate(finetune_section("ia3", tasks=["sing"]), "finetune", Params)
    file = ground.root / "data" / "examples" / "train.jsonl"
    with pytest.raises(ParamsError, match=r"finetune\.tasks: .* has no example of sing; null takes all tasks"):
        finetune(params, file, file, ground.root, tmp_path / "m", tmp_path / "r", context(tmp_path))
