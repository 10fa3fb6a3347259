"""`lifecycle label` in a real browser, and runs that wait for rankings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import browser
import pytest
import yaml
from alignment_stages import reward_section, with_model
from label_toys import TEXTS, items
from lm_stages import ROOT, Workplace
from test_flows_lifecycle import ask, start_server
from toy import Toy, build, until

from flows import label, pages, rankings, run, server
from tasks.labels import journal, sheet
from tasks.labels.desk import Desk
from tasks.labels.sheet import Recipe, Sheet
from tasks.stage import DataError, UserError
from tasks.stage.errors import TryAgain

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
PAGE = "document.querySelector('.work')"
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
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        log = self.root / "label.log"
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", "label", "--port", str(self.port), *options],
                cwd=self.root, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=output, stderr=output,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
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
    service.start()
    yield service
    if service.end(None) is None:
        service.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    program = browser.found()
    if program is None:
        problem = "no Chromium here: tests/install_browser installs one on Debian, for root"
        if "CI" in os.environ:
            pytest.fail(problem)
        pytest.skip(problem)
    with browser.started(program, tmp_path_factory.mktemp("chromium")) as started:
        yield started


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
    tab.until(f"{ITEM} !== {json.dumps(before)} || document.querySelector('.end').offsetParent !== null")
    assert tab.ask(SAID) == said


def rank(tab: browser.Browser) -> None:
    finish(tab, *(key_of(tab, text) for text in SHOWN), "Enter")


def test_ten_prompts_are_ranked_by_keys_through_a_kill_and_teach_a_reward_model(
    tab: browser.Browser, service: Service, workplace: Workplace
) -> None:
    tab.open(service.url, 1600, 1000, "light")
    tab.until("document.querySelector('.who')?.offsetParent")
    tab.ask("document.querySelector('.labeler').value = 'ann'; document.querySelector('.who button').click()")
    tab.until(f"{PAGE}.offsetParent")

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
    tab.until(f"{PAGE}.offsetParent")
    assert tab.ask(COUNT) == "6 of 14"
    while len(service.said()) < 11:
        rank(tab)

    assert service.end(signal.SIGINT) == 0
    assert "10 rankings in inputs/rankings/people.jsonl" in (service.root / "label.log").read_text()
    workplace.run("feedback")
    metrics = workplace.metrics("feedback")
    assert (metrics["train_prompts"] + metrics["test_prompts"], metrics["rejected_rows"]) == (10, 0)
    assert metrics["train_pairs"] + metrics["test_pairs"] == 9 * 3 + 2
    workplace.run("reward")
    assert workplace.metrics("reward")["prompts"] == metrics["test_prompts"]
    assert (workplace.root / "models" / "reward" / "model.safetensors").exists()
    service.start()


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
    tab.open(service.url, 1600, 1000, "light")
    tab.until("document.querySelector('.who')?.offsetParent")
    tab.ask("document.querySelector('.labeler').value = 'bob'; document.querySelector('.who button').click()")
    tab.until(f"{PAGE}.offsetParent")

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
    tab.until("document.querySelector('.work')?.offsetParent || document.querySelector('.who')?.offsetParent")
    tab.ask("document.querySelector('.how').open = true")
    seen = tab.ask()
    assert seen["overflow"] <= 0
    assert sum(int(part) for part in seen["paper"].strip("rgb()").split(",")[:3]) < 150


def test_a_second_page_says_where_the_first_is(service: Service) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "label"], cwd=service.root,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 75
    assert f"served already by process {service.process.pid}: {service.url}" in done.stderr


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


# --- a run waits

PARAMS = """\
from typing import Any

from tasks.stage import Section


class Params(Section):
    source: dict[str, Any]
"""


@pytest.fixture(scope="module")
def unstarted(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Stages by the names of the real ones, the first two of which read inputs/."""
    toy = build(
        tmp_path_factory.mktemp("unstarted") / "toy",
        {"prepare": [], "feedback": ["prepare"], "reward": ["feedback"]},
        light=True,
    )
    (toy.root / "inputs").mkdir()
    (toy.root / "inputs" / "README.md").write_text("data of your own\n")
    graph = yaml.safe_load((toy.root / "dvc.yaml").read_text())
    for name in ("prepare", "feedback"):
        graph["stages"][name]["deps"].append("inputs")
    (toy.root / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
    (toy.root / "tasks" / "feedback.py").write_text(PARAMS)
    params = toy.params() | {"feedback": {"source": {"kind": "rankings"}}}
    (toy.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return toy


@pytest.fixture
def toy(unstarted: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.setenv("LIFECYCLE_TRACKING", "off")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    return unstarted.copy(tmp_path / "toy")


def settled(toy: Toy, wanted: rankings.Wanted) -> run.Run:
    """A run without Prefect, to its end."""
    planned = run.plan(toy.root, wanted=wanted)
    planned.settle_rest()
    planned.close()
    return planned


def give(toy: Toy, count: int, labeler: str = "ann") -> None:
    at = Desk(items(count), toy.root / rankings.ANSWERS, 1, 1.0, saved=lambda: None)
    for _ in range(count):
        shown = at.view(labeler)["item"]
        at.judge(labeler, shown["id"], "ranked", [1, 2, 3], 1.0)


def test_a_run_goes_on_by_itself_as_soon_as_there_are_enough(toy: Toy, tmp_path: Path) -> None:
    give(toy, 2)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(settled, toy, rankings.Wanted(5, 60.0, "stop"))
        until(lambda: toy.starts() == ["prepare"], "the stage before")
        time.sleep(2 * rankings.SECONDS_BETWEEN_LOOKS)
        assert not waiting.done()
        give(toy, 3, "bob")
        assert waiting.result(60).code == 0
    assert len((toy.root / rankings.RANKINGS).read_text().splitlines()) == 5
    assert toy.starts() == ["prepare", "prepare", "feedback", "reward"]  # rankings are an input of prepare too
    assert "up to date" in toy.dvc("status").stdout
    serial = Toy(Path(shutil.copytree(toy.root, tmp_path / "serial")), toy.graph)
    (serial.root / "dvc.lock").unlink()
    serial.dvc("repro")
    assert serial.lock() == toy.lock()


def test_a_run_that_finds_enough_does_not_wait(toy: Toy) -> None:
    give(toy, 3)
    assert settled(toy, rankings.Wanted(3, None, "stop")).code == 0
    before = toy.starts()
    assert settled(toy, rankings.Wanted(3, None, "stop")).code == 0
    assert toy.starts() == before


def test_at_the_deadline_it_ends_with_75_or_goes_on_as_set(toy: Toy) -> None:
    give(toy, 1)
    ended = settled(toy, rankings.Wanted(2, 0.1, "stop"))
    assert (ended.code, ended.results["feedback"].state) == (75, "failed")
    assert ended.results["feedback"].message.startswith("1 of 2 rankings are there and the time is over")
    assert toy.starts() == ["prepare"]
    assert settled(toy, rankings.Wanted(2, 0.1, "go-on")).code == 0
    assert len((toy.root / rankings.RANKINGS).read_text().splitlines()) == 1


def test_a_stop_ends_the_waiting(toy: Toy) -> None:
    planned = run.plan(toy.root, wanted=rankings.Wanted(2, None, "stop"))
    planned.stop.set()
    planned.settle_rest()
    assert planned.code == run.INTERRUPTED


def test_to_wait_in_vain_is_refused(toy: Toy) -> None:
    refused = [
        (("--deadline", "2 weeks"), "--deadline 2 weeks: expected a number with s, m, h or d"),
        (("--stage", "prepare"), "--wait-for-rankings: feedback is not among the stages of this run"),
    ]
    for options, said in refused:
        assert said in toy.lifecycle("run", "--wait-for-rankings", "3", *options, code=2).stderr
    toy.set("feedback", source={"kind": "oracle"})
    with pytest.raises(UserError, match="add --preset labelled"):
        run.plan(toy.root, wanted=rankings.Wanted(1, None, "stop"))


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5m", 90), ("12h", 43200), ("2d", 172800)])
def test_durations(text: str, seconds: float) -> None:
    assert rankings.duration(text) == seconds


def test_nothing_is_collected_under_a_run(toy: Toy) -> None:
    from flows import workspace

    give(toy, 1)
    with workspace.locked(toy.root):
        assert not rankings.collect_unless_running(toy.root)
        assert not (toy.root / rankings.RANKINGS).exists()
        with pytest.raises(TryAgain), workspace.locked(toy.root):
            pass
    assert rankings.collect_unless_running(toy.root)
    assert (toy.root / rankings.RANKINGS).exists()


def test_prefect_shows_the_pause_with_the_page_and_can_end_it(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rankings.note_path(toy.root).write_text("http://127.0.0.1:7861")
    with start_server(toy.root, tmp_path / "prefect") as url:
        process = toy.start("run", "--wait-for-rankings", "9", PREFECT_API_URL=url)

        def state() -> dict[str, Any]:
            runs = ask(url, "flow_runs")
            return runs[0]["state"] if runs else {"type": ""}

        until(lambda: state()["type"] == "PAUSED", "the pause", SECONDS)
        assert state()["message"] == (
            "waiting for 9 rankings, 0 are there: rank answers at http://127.0.0.1:7861"
        )
        assert toy.starts() == ["prepare"]
        resume = f"{url}/flow_runs/{ask(url, 'flow_runs')[0]['id']}/resume"
        urllib.request.urlopen(
            urllib.request.Request(resume, b"{}", {"Content-Type": "application/json"})
        ).close()
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output
        assert state()["type"] == "COMPLETED"
    assert toy.starts() == ["prepare", "feedback", "reward"]
