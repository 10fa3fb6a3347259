"""Toy encoders beside the toy language models, and classifiers on all of them."""

from pathlib import Path

import torch
from lm_toys import COMPUTE, FAMILIES, texts, toy
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from tasks.lm.classifier import Classifier, new_classifier
from tasks.lm.model import save

KINDS = (*FAMILIES, "bert")
LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": None}
PROMPTS = ["Hello there, where do we meet?", "Where is #Person2#?", "Hello there, where do we meet?"]
ANSWERS = ["In the library at noon.", "Gone.", "#Person1# meets #Person2# in room nine."]


def lay_model(kind: str, folder: Path) -> Path:
    """A toy language model or encoder as a folder."""
    if kind in FAMILIES:
        save(toy(kind), folder)
        return folder
    words = sorted(
        set(" ".join(texts()).lower().replace("#", " ").translate(str.maketrans(".,?!:", "     ")).split())
    )
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"#.,?!:'", *letters, *words]
    vocabulary = list(dict.fromkeys(known))
    tokenizer = BertTokenizerFast(vocab={word: place for place, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=256, initializer_range=0.2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def toy_classifier(kind: str, folder: Path) -> Classifier:
    """An untrained reward model whose scores differ from answer to answer."""
    torch.manual_seed(1)
    found = new_classifier(lay_model(kind, folder), COMPUTE)
    found.model.eval()
    return found
