"""The baselines that need no model."""

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.metrics.baselines import lead_1, longest_turn, nearest

DIALOGUE = (
    "\n#Person1#: Hi.\n#Person2#: Could you book the hall on Monday?\n\n#Person1#: Yes, on Monday then, bye."
)
WORDS = st.sampled_from(["book", "Hall", "monday", "send", "invoice", "the", "the"])
TEXTS = st.lists(WORDS, max_size=6).map(" ".join)


def cosine(first: str, second: str, known: list[str]) -> float:
    """The definition, word by word."""

    def weights(text: str) -> dict[str, float]:
        holders = {word: sum(word in other.lower().split() for other in known) for word in text.lower().split()}
        return {
            word: (1 + math.log(count)) * math.log(len(known) / holders[word])
            for word, count in Counter(text.lower().split()).items()
            if holders[word]
        }

    one, two = weights(first), weights(second)
    length = math.sqrt(sum(value**2 for value in two.values()))
    return sum(value * two.get(word, 0) for word, value in one.items()) / (length or 1)


def test_first_and_longest_turn() -> None:
    assert lead_1(DIALOGUE) == "#Person1#: Hi."
    assert longest_turn(DIALOGUE) == "#Person2#: Could you book the hall on Monday?"
    assert lead_1("") == longest_turn("\n") == ""


def test_the_nearest_text_shares_the_rarest_words() -> None:
    known = ["send the invoice", "book the hall", "book the hall on Monday", "book the room on Monday"]
    assert nearest(["Book the HALL, please, on monday!", "an invoice", "nothing shared"], known) == [2, 0, 0]


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(TEXTS, min_size=1, max_size=6))
def test_the_nearest_text_has_the_highest_cosine(texts: list[str], known: list[str]) -> None:
    for text, row in zip(texts, nearest(texts, known), strict=True):
        scores = [cosine(text, other, known) for other in known]
        assert math.isclose(scores[row], max(scores), abs_tol=1e-12)
