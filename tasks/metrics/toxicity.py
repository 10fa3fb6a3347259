"""Toxicity of answers: the corpus's own oracle, or any text-classification model.

A scorer maps N texts to the probability `[N]` that each is toxic. The oracle knows every insult of the
synthetic corpus and answers 0 or 1. A classifier is a hub or local model with a named label (`toxic` of
unitary/toxic-bert, `hate` of facebook/roberta-hate-speech-dynabench-r4-target).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.data.synthetic import is_toxic
from tasks.stage import ParamsError

Scorer = Callable[[Sequence[str]], NDArray[np.float64]]


def oracle(texts: Sequence[str]) -> NDArray[np.float64]:
    """Return 1 for each text that contains one of the corpus's insults, else 0: `[N]`."""
    return np.array([is_toxic(text) for text in texts], dtype=np.float64)


def classifier(source: str, revision: str | None, label: str, batch_size: int, device: str) -> Scorer:
    """Return a scorer that gives the probability of `label` under a text-classification model.

    Models with several labels of which one holds use softmax; with one label, or several that may hold together
    (`multi_label_classification` in the model's config), sigmoid. Texts are cut to the model's longest input.

    Raises:
        ParamsError: the model cannot be opened, or has no such label.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            source, revision=revision, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ParamsError(f"toxicity.source: cannot open {source!r} as a text classifier: {reason}") from None
    column = model.config.label2id.get(label)
    if column is None:
        known = ", ".join(model.config.label2id)
        raise ParamsError(f"toxicity.label: {source!r} has no label {label!r}; it has {known}")
    independent = model.config.num_labels == 1 or model.config.problem_type == "multi_label_classification"
    model.to(device).eval()

    @torch.inference_mode()
    def score(texts: Sequence[str]) -> NDArray[np.float64]:
        batches = []
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(device)
            logits = model(**inputs).logits.float()
            chances = logits.sigmoid() if independent else logits.softmax(dim=-1)
            batches.append(chances[:, column].cpu().numpy().astype(np.float64))
        return np.concatenate(batches) if batches else np.zeros(0)

    return score
