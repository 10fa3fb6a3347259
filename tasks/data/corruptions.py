"""Controlled faults in a right answer of the synthetic corpus, so that a ranking has something to rank down.

Each fault is of one kind and nothing else about the answer changes: an insult inside the sentence (`toxic`), a
wrong thing, place or time (`wrong_slot`), the two people in each other's place (`swapped`), the end missing
(`truncated`), words said again and again (`repeating`).
"""

import random
import re
from collections.abc import Callable, Iterator

from tasks.data.records import Example
from tasks.data.synthetic import EVENTS, INSULTS, PLACES, SPEAKERS, THINGS, TIMES

LEXICONS = (EVENTS, THINGS, PLACES, TIMES)
ROUNDS = 3  # how often each kind is tried

_INSULTED = re.compile(rf"\bthe (?:{'|'.join(INSULTS)}) (?={'|'.join(SPEAKERS)})", re.IGNORECASE)
_AGAIN = re.compile(r"(?<!\w)([\w#].*?)\W+\1(?!\w)")


def without_insult(text: str) -> str:
    """`text` without the insults that stand before a person, as the corpus places them."""
    return _INSULTED.sub("", text)


def is_whole(answer: str, reference: str) -> bool:
    """Whether `answer` has the full stop of `reference`, if there is one, and says no words twice in a row."""
    stop = reference[len(reference.rstrip(".")) :]
    return bool(answer) and answer.endswith(stop) and _AGAIN.search(answer) is None


def corruptions(example: Example, draw: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of distinct faulty answers to `example`, in an order that `draw` gives.

    Made from the reference without its insult, which is the first of all and of the kind `clean`: so there is
    something right in a ranking, as where a person's demonstration is ranked with the answers. A kind that does
    not fit the reference is left out.
    """
    reference = without_insult(example.reference)
    seen = {example.reference, reference}
    yield "clean", reference
    for _ in range(ROUNDS):
        for kind in draw.sample(tuple(KINDS), len(KINDS)):
            text = KINDS[kind](reference, example, draw)
            if text is not None and text not in seen:
                seen.add(text)
                yield kind, text


def _toxic(reference: str, example: Example, draw: random.Random) -> str | None:
    """The insult of the dialogue, or any, before one of the people."""
    people = [person for person in SPEAKERS if person in reference]
    if not people:
        return None
    person = draw.choice(people)
    heard = [insult for insult in INSULTS if re.search(rf"\b{insult}\b", example.input, re.IGNORECASE)]
    insulted = reference.replace(person, f"the {draw.choice(heard or INSULTS)} {person}", 1)
    return insulted[0].upper() + insulted[1:]


def _wrong_slot(reference: str, example: Example, draw: random.Random) -> str | None:
    """Another value for a thing, place or time, whether the dialogue mentions it or not."""
    changes = [
        (value, draw.choice([other for other in lexicon if other != value]))
        for value in example.slots.values()
        for lexicon in LEXICONS
        if value in lexicon and value in reference
    ]
    return reference.replace(*draw.choice(changes)) if changes else None


def _swapped(reference: str, _example: Example, _draw: random.Random) -> str | None:
    """The two people in each other's place."""
    one, other = SPEAKERS
    if one not in reference or other not in reference:
        return None
    return re.sub(f"{one}|{other}", lambda found: other if found[0] == one else one, reference)


def _truncated(reference: str, _example: Example, draw: random.Random) -> str | None:
    """The first third to two thirds of the words."""
    words = reference.split()
    return " ".join(words[: draw.randint(len(words) // 3, 2 * len(words) // 3)]) or None


def _repeating(reference: str, _example: Example, draw: random.Random) -> str | None:
    """The last words, or the whole sentence, two or three times more."""
    words = reference.rstrip(".").split()
    tail = words if draw.random() < 0.25 else words[-draw.randint(1, 4) :]
    end = reference[len(reference.rstrip(".")) :]
    return " ".join(words + tail * draw.randint(2, 3)) + end


KINDS: dict[str, Callable[[str, Example, random.Random], str | None]] = {
    "toxic": _toxic,
    "wrong_slot": _wrong_slot,
    "swapped": _swapped,
    "truncated": _truncated,
    "repeating": _repeating,
}
