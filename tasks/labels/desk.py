"""Who is shown what: the next item of each labeler, blind and shuffled, the same again after a restart."""

import hashlib
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from tasks.labels import journal
from tasks.labels.journal import Judgement, Verdict
from tasks.labels.sheet import Item
from tasks.stage import UserError

OTHER_VERDICTS = set(get_args(Verdict)) - {"undone"}


class Desk:
    """Hands out the items of a sheet and takes what labelers say of them; may be called by several threads.

    The share `overlap` of the items is for every labeler, so that their agreement can be told; each of the
    others is for whoever comes to it first. `saved` is called after each line. `folder` holds the journals.
    """

    def __init__(
        self, items: Sequence[Item], folder: Path, seed: int, overlap: float, saved: Callable[[], object]
    ) -> None:
        self._items = {item.id: item for item in items}
        self._folder, self._seed, self._saved = folder, seed, saved
        self._shared = {name for name in self._items if _draw(seed, name) < overlap}
        self._said: dict[str, dict[str, Judgement]] = journal.read_all(folder)
        self._lock = threading.Lock()

    def view(self, labeler: str) -> dict[str, Any]:
        """What a labeler sees now: the next item (None at the end), how many are done, and of how many.

        It tells nothing of who made an answer. Raises UserError for a name that makes no file name.
        """
        journal.path_of(self._folder, labeler)
        with self._lock:
            return self._view(labeler)

    def judge(
        self,
        labeler: str,
        name: str,
        verdict: str,
        answers: Sequence[str],
        ranks: Sequence[int],
        seconds: float,
    ) -> dict[str, Any]:
        """Save what `labeler` says of the item `name`: the `answers`, in the order shown, and the rank of each.

        Returns the next view. An item that is judged already (in another window, say) is left as it is. Raises
        UserError when the ranks do not fit, or there is no such item with these answers.
        """
        path = journal.path_of(self._folder, labeler)
        texts = [answer.text for answer in self._items[name].answers] if name in self._items else []
        if not texts or sorted(answers) != sorted(texts) or verdict not in OTHER_VERDICTS:
            raise UserError("the prompts were exchanged meanwhile: load the page again")
        with self._lock:
            said = self._said.setdefault(labeler, {})
            if name not in said:
                places = [texts.index(text) for text in answers]
                kind: Any = verdict
                judgement = journal.judged(self._items[name], labeler, kind, ranks, places, _now(), seconds)
                journal.append(path, judgement)
                said[name] = judgement
                self._saved()
            return self._view(labeler)

    def undo(self, labeler: str) -> dict[str, Any]:
        """Take back what `labeler` said last, if anything, and show it again."""
        path = journal.path_of(self._folder, labeler)
        with self._lock:
            said = self._said.setdefault(labeler, {})
            ours = [name for name in said if name in self._items]
            if not ours:
                return self._view(labeler)
            journal.append(path, said[ours[-1]].model_copy(update={"verdict": "undone", "at": _now()}))
            del said[ours[-1]]
            self._saved()
            return self._view(labeler, first=ours[-1])

    def _view(self, labeler: str, first: str | None = None) -> dict[str, Any]:
        said = self._said.get(labeler, {})
        theirs = [name for name in self._order(labeler) if name in said or self._free(labeler, name)]
        done = sum(name in said for name in theirs)
        following = first or next((name for name in theirs if name not in said), None)
        shown = None
        if following is not None:
            item = self._items[following]
            answers = [item.answers[place].text for place in self._places(labeler, following)]
            shown = {"id": following, "prompt": item.prompt, "answers": answers}
        return {"labeler": labeler, "item": shown, "done": done, "total": len(theirs), "undo": done > 0}

    def _order(self, labeler: str) -> list[str]:
        return sorted(self._items, key=lambda name: _draw(self._seed, labeler, name))

    def _places(self, labeler: str, name: str) -> list[int]:
        """The answers of an item in the order in which a labeler sees them."""
        places = list(range(len(self._items[name].answers)))
        random.Random(f"{self._seed}:{labeler}:{name}").shuffle(places)
        return places

    def _free(self, labeler: str, name: str) -> bool:
        others: list[Mapping[str, Judgement]] = [said for other, said in self._said.items() if other != labeler]
        return name in self._shared or not any(
            name in said and said[name].verdict != "skipped" for said in others
        )


def _draw(seed: int, *parts: str) -> float:
    """A number from 0 to 1 that depends on the words alone."""
    digest = hashlib.sha256("\0".join([str(seed), *parts]).encode()).digest()
    return int.from_bytes(digest[:8]) / 2.0**64


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
