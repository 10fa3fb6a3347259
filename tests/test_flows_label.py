"""`lifecycle label` in a real browser, and what it refuses."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import command_host
import pytest
import yaml
from alignment_stages import reward_section, with_model
from label_toys import TEXTS, items
from lm_stages import ROOT, Workplace
from toy import until

from flows import label, pages, rankings, server
from tasks.labels import journal, sheet
from tasks.labels.sheet import Recipe, Sheet
from tasks.stage import DataError, UserError

HOSTILE = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">Nothing."
SHOWN = [TEXTS[0], TEXTS[1], HOSTILE]  # best first
RECIPE = Recipe(
    variants=("base", "finetune", "ppo"),
    samples=1,
    temperature=1.0,
    task="summarize",
    split="train",
    prompts=14,
    seed=1,
)
ITEM = "document.querySelector('.prompt').textContent"
COUNT = "document.querySelector('.count').textContent"
SAID = "document.querySelector('.said').textContent"
CODES = {"=": "Equal", "Enter": "Enter", "Backspace": "Backspace"}
SECONDS = 240


# --- the page


class Service:
    """The command in a folder of its own; it may be killed and started again on the same port."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, server.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: command_host.Command | None = None

    def start(self, *options: str) -> None:
        log = self.root / "label.log"
        command = [sys.executable, "-m", "flows.cli", "label", "--port", str(self.port), "--overlap", "1"]
        self.process = command_host.start([*command, *options], self.root, os.environ, log)
        until(lambda: self.url in log.read_text() or self.end(None) is not None, "the page", SECONDS)
        assert self.process.poll() is None, log.read_text()

    def end(self, number: signal.Signals | None) -> int | None:
        assert self.process is not None
        if number is None:
            return self.process.poll()
        self.process.send_signal(number)
        return self.process.wait(60)

    def said(self) -> dict[str, journal.Judgement]:
        return journal.read(self.root / rankings.ANSWERS / "ann.jsonl")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A toy model, and a sheet with answers that attack the page."""
    made = with_model(tmp_path_factory.mktemp("label"), "t5")
    found = items(14, texts=SHOWN)
    sheet.write(made.root / rankings.SHEET, Sheet(recipe=RECIPE, items=tuple(found)))
    (made.root / ".dvc").mkdir()
    preset = yaml.safe_load((ROOT / "presets" / "labelled.yaml").read_text())["feedback"]
    made.set(feedback={**preset, "shown": 1}, reward=reward_section())
    return made


@pytest.fixture(scope="module")
def service(workplace: Workplace) -> Iterator[Service]:
    service = Service(workplace.root)
    try:
        service.start()
        yield service
    finally:
        if service.end(None) is None:
            service.end(signal.SIGKILL)


def visible(*names: str) -> str:
    return " || ".join(f"document.querySelector('.{name}')?.offsetParent" for name in names)


def come_in(tab: browser.Browser, service: Service, labeler: str) -> None:
    tab.open(service.url, 1600, 1000, "light")
    tab.until(f"Boolean({visible('who', 'work')})")
    tab.ask("document.querySelector('.change').click()")
    tab.ask(
        f"document.querySelector('.labeler').value = '{labeler}'; document.querySelector('.who button').click()"
    )
    tab.until(f"Boolean({visible('work')})")


def press(tab: browser.Browser, *keys: str) -> None:
    for key in keys:
        code = CODES.get(key, f"Digit{key}" if key.isdigit() else f"Key{key.upper()}")
        for kind in ("rawKeyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, key=key, code=code)


def shown(tab: browser.Browser) -> list[str]:
    """The answers by the number that is their key."""
    texts = "[...document.querySelectorAll('.card')].sort((a, b) => a.dataset.answer - b.dataset.answer)"
    found: list[str] = tab.ask(f"{texts}.map(card => card.querySelector('.text').textContent)")
    return found


def key_of(tab: browser.Browser, text: str) -> str:
    return str(shown(tab).index(text) + 1)


def finish(tab: browser.Browser, *keys: str, said: str = "Saved.") -> None:
    """Press the keys that end an item, and wait until the next one is there."""
    before = tab.ask(ITEM)
    press(tab, *keys)
    tab.until(f"{ITEM} !== {json.dumps(before)} || Boolean({visible('end')})")
    assert tab.ask(SAID) == said


def rank(tab: browser.Browser) -> None:
    finish(tab, *(key_of(tab, text) for text in SHOWN), "Enter")


DRAG = """
((from, onto) => {
  const data = new DataTransfer();
  const event = (kind) => new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: data});
  const cards = [...document.querySelectorAll('.card')];
  cards.find(card => card.dataset.answer === String(from)).dispatchEvent(event('dragstart'));
  const target = document.querySelectorAll(onto);
  const last = target[target.length - 1];
  last.dispatchEvent(event('dragover'));
  last.dispatchEvent(event('drop'));
  return [...document.querySelectorAll('.place')].map(
    place => [...place.querySelectorAll('.card')].map(card => Number(card.dataset.answer)));
})
"""


def test_answers_are_dragged_before_onto_and_away(tab: browser.Browser, service: Service) -> None:
    come_in(tab, service, "bob")

    def drag(answer: int, onto: str) -> Any:
        return tab.ask(f"{DRAG}({answer}, '{onto}')")

    assert drag(1, ".gap.last") == [[1]]
    assert drag(0, ".gap:not(.last)") == [[0], [1]]
    assert drag(2, ".place") == [[0], [1, 2]]
    assert drag(2, ".gap:not(.last)") == [[0], [2], [1]]
    assert drag(0, ".gap.last") == [[2], [1], [0]]
    assert drag(1, ".rest") == [[2], [0]]
    assert drag(0, ".place") == [[2], [0]]
    assert drag(0, ".gap:not(.last)") == [[2], [0]]
    tab.ask("document.querySelector('.card').click()")  # takes the only one of the rest
    tab.ask("document.querySelector('.save').click()")
    tab.until(f"{SAID} === 'Saved.'")
    [said] = journal.read(service.root / rankings.ANSWERS / "bob.jsonl").values()
    assert said.levels == (0, 1, 2)


@pytest.mark.parametrize("width", [400, 1600])
def test_the_page_fits_its_window(tab: browser.Browser, service: Service, width: int) -> None:
    tab.open(service.url, width, 900, "dark")
    tab.until(f"Boolean({visible('who', 'work')})")
    tab.ask("document.querySelector('.how').open = true")
    seen = tab.ask()
    assert seen["overflow"] <= 0
    assert sum(int(part) for part in seen["paper"].strip("rgb()").split(",")[:3]) < 150


def test_a_second_page_says_where_the_first_is(service: Service) -> None:
    done = command_host.run([sys.executable, "-m", "flows.cli", "label"], service.root, os.environ)
    assert done.returncode == 75
    assert f"served already by process {service.process.pid}: {service.url}" in done.stderr


def test_ten_prompts_are_ranked_by_keys_through_a_kill_and_teach_a_reward_model(
    tab: browser.Browser, service: Service, workplace: Workplace
) -> None:
    come_in(tab, service, "ann")

    assert sorted(shown(tab)) == sorted(SHOWN)
    assert tab.ask("document.title") == "Rank answers"
    assert tab.ask("document.querySelectorAll('.card b, .card img, .card script').length") == 0
    assert tab.complaints(own=(service.url, "data:", "blob:")) == []
    assert not any(name in tab.ask("document.documentElement.outerHTML") for name in ("finetune", '"ppo"'))

    rank(tab)
    press(tab, key_of(tab, SHOWN[0]), "=", key_of(tab, SHOWN[1]))
    finish(tab, "Enter")  # the one that is left is the last
    finish(tab, "b", said="Saved: all bad.")
    finish(tab, "s", said="Skipped.")
    assert tab.ask(COUNT) == "4 of 14"
    finish(tab, "u", said="Taken back: judge it again.")
    assert tab.ask(COUNT) == "3 of 14"
    rank(tab)
    press(tab, key_of(tab, SHOWN[2]), "Backspace", "Enter")
    assert tab.ask(SAID) == "Not ranked yet: 1, 2, 3."
    rank(tab)
    given = list(service.said().values())
    assert [each.verdict for each in given] == ["ranked", "ranked", "all bad", "ranked", "ranked"]
    assert [each.levels for each in given] == [(0, 1, 2), (0, 0, 1), (0, 0, 0), (0, 1, 2), (0, 1, 2)]
    assert all(list(each.completions) == SHOWN for each in given if each.verdict == "ranked" and not each.ties)

    service.end(signal.SIGKILL)
    waiting = tab.ask(ITEM)
    press(tab, *(key_of(tab, text) for text in SHOWN), "Enter")
    tab.until(f"{SAID}.startsWith('Not saved')")
    assert tab.ask(ITEM) == waiting
    assert len(service.said()) == 5
    service.start("--labeler", "ann")
    finish(tab, "Enter")  # the same page, as it stands
    assert len(service.said()) == 6
    tab.open(service.url, 400, 900, "dark")
    tab.until(f"Boolean({visible('work')})")
    assert tab.ask(COUNT) == "6 of 14"
    while len(service.said()) < 11:
        rank(tab)

    assert service.end(signal.SIGINT) == 0
    given = [
        each for held in journal.read_all(service.root / rankings.ANSWERS).values() for each in held.values()
    ]
    preferring = [each for each in given if each.pairs]
    assert len(preferring) >= 10
    said = f"{len(preferring)} rankings in inputs/rankings/people.jsonl"
    assert said in (service.root / "label.log").read_text()
    workplace.run("feedback")
    metrics = workplace.metrics("feedback")
    assert metrics["train_prompts"] + metrics["test_prompts"] == len(preferring)
    assert metrics["train_pairs"] + metrics["test_pairs"] == sum(len(each.pairs) for each in given)
    workplace.run("reward")
    assert workplace.metrics("reward")["prompts"] == metrics["test_prompts"]
    assert (workplace.root / "models" / "reward" / "model.safetensors").exists()


# --- what is asked for wrongly


def test_others_are_let_in_only_with_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pages.PASSWORD, raising=False)
    (tmp_path / ".work").mkdir()
    with pytest.raises(UserError, match="set a password in LIFECYCLE_PASSWORD"):
        label.label(tmp_path, label.Wishes(), False, 0.2, "", "0.0.0.0", server.free_port())


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        (
            {"variants": ["bse"]},
            r"--variant bse: expected one of evaluate.variants without shots \(base, ppo\)",
        ),
        ({"variants": ["few"]}, "--variant few: expected one of"),
        ({"variants": ["ppo"]}, "models/ppo is missing: run the stage that makes it"),
        ({"variants": ["base"], "samples": 1}, "1 variants with 1 answers each: expected 2 to 9"),
        ({"samples": 10}, "1 variants with 10 answers each"),
    ],
)
def test_wishes_that_cannot_be_met(
    wishes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    variants = {
        name: {"model": name.removesuffix("few") or "base", "shots": name == "few"}
        for name in ("base", "ppo", "few")
    }
    settings = {"task": "summarize", "variants": variants}
    with pytest.raises((UserError, DataError), match=said):
        label._recipe(settings, label.Wishes(**wishes), 1)
    usual = label._recipe(settings, label.Wishes(), 1)
    assert (usual.variants, usual.samples, usual.task) == (("base",), 4, "summarize")


def test_a_sheet_is_not_exchanged_unseen(tmp_path: Path) -> None:
    sheet.write(tmp_path / rankings.SHEET, Sheet(recipe=RECIPE, items=tuple(items(2))))
    same = label.Wishes(variants=["base", "finetune", "ppo"], prompts=14)
    assert len(label._sheet(tmp_path, same, new=False, seed=1).items) == 2
    with pytest.raises(UserError, match="was made with prompts 14: --new makes another, and keeps"):
        label._sheet(tmp_path, label.Wishes(prompts=20), new=False, seed=1)
    (tmp_path / rankings.SHEET).write_text("{")
    with pytest.raises(DataError, match="is no sheet"):
        label._sheet(tmp_path, same, new=False, seed=1)
