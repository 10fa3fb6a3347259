"""What a base model learns from raw text.

A seq2seq model learns to fill gaps (span corruption, T5, 1910.10683 §3.1.4) and, for a share of the texts, to
continue them (prefix language modelling: UL2, 2205.05131; LM adaptation, 2104.08691): without that share a T5
can fill gaps but not write. A causal model predicts every next token of whole documents packed into blocks.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.lm.model import LanguageModel
from tasks.lm.respond import closed, continuation, whole_text
from tasks.lm.train import Pair
from tasks.stage import DataError, ParamsError

PARAGRAPH = "\n\n"  # a blank line between two


def read_texts(path: Path) -> list[str]:
    """The `text` of every line of a JSON lines file. Raises DataError when it is missing or empty."""
    try:
        with path.open(encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run prepare first") from None
    if not texts:
        raise DataError(f"{path} holds no text; give prepare a source of raw text")
    return texts


class Part(NamedTuple):
    """Token ids of a text, or of one part of a long one; `text` is set where it is whole and has paragraphs."""

    ids: list[int]
    text: str | None


def documents(lm: LanguageModel, texts: Sequence[str], max_tokens: int) -> list[Part]:
    """The texts as token ids, long ones in parts of `max_tokens`; less than 2 tokens are left out."""
    encoded = lm.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    parts = (
        Part(ids[at : at + max_tokens], text if PARAGRAPH in text and len(ids) <= max_tokens else None)
        for text, ids in zip(texts, encoded, strict=True)
        for at in range(0, len(ids), max_tokens)
    )
    return [part for part in parts if len(part.ids) > 1]


def cut(lm: LanguageModel, part: Part, where: float) -> Pair:
    """A text as prompt and response, cut at `where` of it (from 0 to 1): between paragraphs if it has several.

    The end of a paragraph is where a writer begins something new that all before it bears upon, so that is
    where continuing teaches most.
    """
    if part.text is None:
        return continuation(lm, part.ids, 1 + int(where * (len(part.ids) - 1)))
    paragraphs = part.text.split(PARAGRAPH)
    first = 1 + int(where * (len(paragraphs) - 1))
    halves = [PARAGRAPH.join(paragraphs[:first]), PARAGRAPH.join(paragraphs[first:])]
    prompt, response = lm.tokenizer(halves, add_special_tokens=False, verbose=False)["input_ids"]
    return closed(lm, prompt, response)


def objective(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    max_tokens: int,
    corrupted: float,
    mean_span: float,
    prefix_share: float,
    seed: int,
) -> tuple[list[int], Callable[[int], Pair]]:
    """Lengths of the rows to train on, and the function from a draw (epoch * rows + row) to its pair.

    Every draw of a seq2seq model makes new gaps. Raises ParamsError when the tokenizer has no sentinels.
    """
    if not lm.is_encoder_decoder:
        return _next_token(lm, texts, max_tokens)
    parts = documents(lm, texts, max_tokens)
    sentinels = sentinel_ids(lm)
    if prefix_share < 1 and len(sentinels) < sentinels_needed(max_tokens, corrupted, mean_span):
        raise ParamsError(
            f"base.pretraining: {len(sentinels)} sentinel tokens <extra_id_N> in the tokenizer are too few for "
            "span corruption; lower max_tokens or set prefix_share to 1"
        )

    def pair(draw: int) -> Pair:
        part = parts[draw % len(parts)]
        generator = np.random.default_rng((seed, draw))
        if generator.random() < prefix_share:
            return cut(lm, part, generator.random())
        return span_corruption(part.ids, sentinels, lm.tokenizer.eos_token_id, corrupted, mean_span, generator)

    return [len(part.ids) for part in parts], pair


def _next_token(
    lm: LanguageModel, texts: Sequence[str], max_tokens: int
) -> tuple[list[int], Callable[[int], Pair]]:
    wholes = [whole_text(lm, part.ids) for part in documents(lm, texts, max_tokens - 2)]  # start and end token
    blocks = list(packed(wholes, max_tokens))

    def pair(draw: int) -> Pair:
        block = blocks[draw % len(blocks)]
        return block[:1], block[1:]

    return [len(block) for block in blocks], pair


def span_corruption(
    ids: Sequence[int],
    sentinels: Sequence[int],
    end: int,
    corrupted: float,
    mean_span: float,
    generator: np.random.Generator,
) -> Pair:
    """T5's task: the text with gaps marked by sentinels, and what was in them, behind the same sentinels.

    A share `corrupted` of the tokens is left out, in spans of `mean_span` tokens on average; a text never
    begins with a gap. The response closes with one more sentinel and the end token.
    """
    gone = min(max(round(len(ids) * corrupted), 1), len(ids) - 1)
    spans = min(max(round(gone / mean_span), 1), gone, len(ids) - gone)
    prompt: list[int] = []
    response: list[int] = []
    at = 0
    kept, dropped = _parts(len(ids) - gone, spans, generator), _parts(gone, spans, generator)
    for sentinel, keep, drop in zip(sentinels[:spans], kept, dropped, strict=True):
        prompt += [*ids[at : at + keep], sentinel]
        response += [sentinel, *ids[at + keep : at + keep + drop]]
        at += keep + drop
    return [*prompt, end], [*response, sentinels[spans], end]


def packed(parts: Sequence[list[int]], max_tokens: int) -> Iterator[list[int]]:
    """Whole documents behind one another, as many as fit in blocks of `max_tokens`."""
    block: list[int] = []
    for part in parts:
        if block and len(block) + len(part) > max_tokens:
            yield block
            block = []
        block = block + part
    if block:
        yield block


def sentinels_needed(max_tokens: int, corrupted: float, mean_span: float) -> int:
    """Sentinels that the longest text asks for, the closing one included."""
    return max(round(round(max_tokens * corrupted) / mean_span), 1) + 1


def sentinel_ids(lm: LanguageModel) -> list[int]:
    """Ids of the tokens `<extra_id_0>`, `<extra_id_1>` … that the tokenizer has."""
    vocabulary = lm.tokenizer.get_vocab()
    found: list[int] = []
    while (name := f"<extra_id_{len(found)}>") in vocabulary:
        found.append(vocabulary[name])
    return found


def _parts(total: int, parts: int, generator: np.random.Generator) -> list[int]:
    """`total` cut at random into positive numbers, every way of cutting as likely as any other."""
    cuts = np.sort(generator.choice(total - 1, parts - 1, replace=False)) + 1
    sizes: list[int] = np.diff(cuts, prepend=0, append=total).tolist()
    return sizes
