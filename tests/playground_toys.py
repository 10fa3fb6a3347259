"""A repository with toy models, as `lifecycle chat` finds it."""

from pathlib import Path

import yaml
from lm_toys import COMPUTE, OPTIONS, shake, toy

from tasks.data.synthetic import examples as synthetic
from tasks.lm.model import load, save
from tasks.lm.peft import adapt

ROOT = Path(__file__).parents[1]
HOSTILE = "<img src=x onerror=\"document.title='taken'\"> ${1+1} {{value}} </textarea><b>&amp;"


def lay_out(root: Path) -> Path:
    """Models of both families, an adapter, and examples; there is no reward model."""
    save(toy("t5"), root / "models" / "base")
    lm = load(root / "models" / "base", COMPUTE, trainable=True)
    lm = adapt(lm, "lora", OPTIONS["lora"] | {"dropout": 0.0})
    shake(lm)
    save(lm, root / "models" / "finetune")
    save(toy("llama"), root / "models" / "ppo")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["compute"] = COMPUTE.model_dump()
    params["evaluate"]["generation"]["max_new_tokens"] = 6
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / ".dvc").mkdir()
    (root / "data" / "examples").mkdir(parents=True)
    made = list(synthetic(3, 20))
    for split, part in (("train", made[:45]), ("test", made[45:])):
        lines = "".join(example.line() + "\n" for example in part)
        (root / "data" / "examples" / f"{split}.jsonl").write_text(lines)
    return root
