"""What a base model learns from raw text.

A share of the texts is continued: the loss is on what stands behind a cut alone (prefix language modelling:
UL2, 2205.05131; LM adaptation, 2104.08691). From the others a seq2seq model learns to fill gaps (span
corruption, T5, 1910.10683 §3.1.4), and a causal model predicts every next token. Without the first share a
T5 can fill gaps but not write, and a small causal model spends its time on words that nobody can foretell.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tasks.lm.collate import closed, continuation, whole_text
from tasks.lm.model import LanguageModel
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


def cut(lm: LanguageModel, parts: Sequence[Part], places: Sequence[float]) -> list[Pair]:
    """Texts as prompts and responses, each cut at its place, from 0 to 1: between paragraphs where it has any.

    The end of a paragraph is where a writer begins something new that all before it bears upon, so that is
    where continuing teaches most.
    """
    halves: list[str] = []
    between = "" if lm.is_encoder_decoder else PARAGRAPH  # a causal model reads on in the same text
    for part, place in zip(parts, places, strict=True):
        if part.text is not None:
            paragraphs = part.text.split(PARAGRAPH)
            first = 1 + int(place * (len(paragraphs) - 1))
            halves += [PARAGRAPH.join(paragraphs[:first]) + between, PARAGRAPH.join(paragraphs[first:])]
    encoded = lm.tokenizer(halves, add_special_tokens=False, verbose=False)["input_ids"] if halves else []
    ids = iter(encoded)
    return [
        continuation(lm, part.ids, 1 + int(place * (len(part.ids) - 1)))
        if part.text is None
        else closed(lm, next(ids), next(ids))
        for part, place in zip(parts, places, strict=True)
    ]


class Lessons(NamedTuple):
    """How many rows there are to learn from, and the function from a draw (epoch * rows + row) to its pair."""

    rows: int
    pair: Callable[[int], Pair]


def objective(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    max_tokens: int,
    corrupted: float,
    mean_span: float,
    prefix_share: float,
    seed: int,
) -> Lessons:
    """What there is to learn from texts; a longer one than `max_tokens` is read in parts.

    Every draw makes new cuts and gaps. Raises ParamsError when the tokenizer has too few sentinels.
    """
    rest = (
        _gaps(lm, max_tokens, corrupted, mean_span, prefix_share) if lm.is_encoder_decoder else _next_token(lm)
    )
    room = max_tokens if lm.is_encoder_decoder else max_tokens - 2  # a causal text has a start and an end token
    parts = documents(lm, texts, room)

    @lru_cache(maxsize=1)
    def pairs(epoch: int) -> list[Pair]:  # of a whole epoch, since to encode texts one by one takes long
        found: dict[int, Pair] = {}
        places: dict[int, float] = {}
        for row, part in enumerate(parts):
            generator = np.random.default_rng((seed, epoch * len(parts) + row))
            if generator.random() < prefix_share:
                places[row] = generator.random()
            else:
                found[row] = rest(part, generator)
        cuts = cut(lm, [parts[row] for row in places], list(places.values()))
        found |= zip(places, cuts, strict=True)
        return [found[row] for row in range(len(parts))]

    return Lessons(len(parts), lambda draw: pairs(draw // len(parts))[draw % len(parts)])


Task = Callable[[Part, np.random.Generator], Pair]


def _gaps(lm: LanguageModel, max_tokens: int, corrupted: float, mean_span: float, prefix_share: float) -> Task:
    sentinels = sentinel_ids(lm)
    if prefix_share < 1 and len(sentinels) < sentinels_needed(max_tokens, corrupted, mean_span):
        raise ParamsError(
            f"base.pretraining: {len(sentinels)} sentinel tokens <extra_id_N> in the tokenizer are too few for "
            "span corruption; lower max_tokens or set prefix_share to 1"
        )
    end = lm.tokenizer.eos_token_id
    return lambda part, generator: span_corruption(part.ids, sentinels, end, corrupted, mean_span, generator)


def _next_token(lm: LanguageModel) -> Task:
    def pair(part: Part, _: np.random.Generator) -> Pair:
        text = whole_text(lm, part.ids)
        return text[:1], text[1:]

    return pair


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
