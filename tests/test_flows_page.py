"""The page of `lifecycle report`: its pictures, what it says, without files too, and in a browser."""

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import browser
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from toy import Toy, build

from flows import charts, findings, page, page_parts, pipeline
from flows.charts import Dot, Line, Span
from flows.graph_picture import Box, direct, layers, picture
from tasks.stage import tracking

COPIED = ("dvc.yaml", "dvc.lock", "params.yaml", "metrics", "reports", "tasks", ".dvcignore", ".gitignore")
HOSTILE = "<script>alert(1)</script><img src=http://example.org/x.png onerror=alert(1)>\"'&"
WINDOWS = [(400, 900), (1600, 1000)]


@pytest.fixture(scope="module")
def copy(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has of this repository's pipeline, without models, data and runs, in a repository of its own."""
    root = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", page.PAGE.name))
        else:
            shutil.copy(source, root / name)
    (root / ".dvc").mkdir()
    for name in (".dvc/config", ".dvc/.gitignore"):
        shutil.copy(repository / name, root / name)
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "--quiet"], ["add", "--all"], [*who, "commit", "--quiet", "-m", "copy"]):
        subprocess.run(["git", *command], cwd=root, check=True, capture_output=True)
    return root


@pytest.fixture(scope="module")
def written(copy: Path) -> Path:
    """The page of that copy, written by the command."""
    done = Toy(copy, {}).lifecycle("report")
    assert done.stdout == "reports/lifecycle.html\n"
    assert done.stderr == ""
    return copy / page.PAGE


@pytest.fixture
def root(copy: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(copy, tmp_path / "root", ignore=shutil.ignore_patterns(page.PAGE.name)))


def svgs(text: str) -> list[ElementTree.Element]:
    """The pictures in a text, which must be well-formed."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


# --- pure functions


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1.0, 1.0)], [0]),
        ([(2.0, 0.9), (1.0, 0.5), (3.0, 0.8)], [1, 0]),
        ([(1.0, 0.5), (1.0, 0.6)], [1]),
        ([(1.0, 0.5), (2.0, 0.5)], [0]),
        ([(1.0, 0.5), (1.0, 0.5)], [0, 1]),
    ],
)
def test_pareto(points: list[tuple[float, float]], front: list[int]) -> None:
    assert charts.pareto(points) == front


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_pareto_leaves_out_exactly_what_is_beaten(points: list[tuple[int, int]]) -> None:
    front = set(charts.pareto([(float(cost), float(quality)) for cost, quality in points]))
    for index, (cost, quality) in enumerate(points):
        beaten = any(c <= cost and q >= quality and (c < cost or q > quality) for c, q in points)
        assert (index in front) is not beaten


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(0.13, 0.97) == [0.2, 0.4, 0.6, 0.8]
    assert charts.ticks(3.0, 3.0) == [3.0]
    assert charts.log_ticks(0.09, 6.0) == pytest.approx([0.1, 0.2, 0.5, 1.0, 2.0, 5.0])


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e9))
def test_ticks_keep_to_their_range(low: float, width: float) -> None:
    found = charts.ticks(low, low + width)
    assert len(found) <= 12
    assert all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in found)


GRAPH = {"a": (), "b": ("a",), "c": ("a", "b"), "d": ("b",), "e": ("c", "d", "a", "gone")}


def test_layers_and_edges_of_the_graph() -> None:
    assert layers(GRAPH) == [["a"], ["b"], ["c", "d"], ["e"]]
    assert direct(GRAPH) == [("a", "b"), ("b", "c"), ("b", "d"), ("c", "e"), ("d", "e")]
    assert layers({}) == []
    assert picture("nothing", {}, {}, "across") == ""


@pytest.mark.parametrize("way", ["across", "down"])
def test_the_picture_of_the_graph_has_every_stage_and_number(way: str) -> None:
    long = "alignment.rude.before.toxicity_rate"
    box = Box("up to date · 3 s", "✓", "good", [("loss", "0.5"), (long, "0.25"), (HOSTILE, "1")])
    [svg] = svgs(picture(HOSTILE, GRAPH, dict.fromkeys(GRAPH, box), "across" if way == "across" else "down"))
    words = [each.text for each in svg.iter() if each.tag == "text"]
    assert [words.count(text) for text in ("a", "e", "0.5", "0.25", "✓ up to date · 3 s")] == [1, 1, 5, 5, 5]
    width = float(svg.attrib["viewBox"].split()[2])
    for rect in svg.iter("rect"):
        assert 0 <= float(rect.attrib["x"]) <= float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width


@pytest.mark.parametrize("points", [[(1.0, 2.0)], [(0.0, 0.0), (1.0, 0.0)], [(0.0, 1e-3), (5.0, 50.0)]])
def test_line_charts_of_few_points(points: list[tuple[float, float]]) -> None:
    text = charts.line_chart(HOSTILE, HOSTILE, "loss", [Line(HOSTILE, points), Line("held-out", points, True)])
    [svg] = svgs(text)
    assert "nan" not in text
    assert ("loss, log scale" in text) is (points[-1][1] == 50.0)
    assert len(list(svg.iter("circle"))) >= len(points)


def test_charts_of_nothing_say_so() -> None:
    nothing = [
        charts.line_chart("curve", "step", "loss", []),
        charts.line_chart("curve", "step", "loss", [Line("x", [(1.0, float("nan"))])]),
        charts.scatter("sizes", "MB", "ROUGE-L", []),
        charts.intervals("toxic", "share", []),
    ]
    assert all("nothing recorded" in text and "<svg" not in text for text in nothing)


@pytest.mark.parametrize("count", [1, 2, 12])
def test_scatter_labels_every_point_inside_of_the_picture(count: int) -> None:
    dots = [Dot(f"model {number} {HOSTILE[:8]}", 1.0, 0.5 + number / 1e3, 0.4, 0.6) for number in range(count)]
    text = charts.scatter("sizes", "MB", "ROUGE-L", dots)
    [svg] = svgs(text)
    labels = [each for each in svg.iter("text") if (each.text or "").startswith("model")]
    assert len(labels) == count
    assert all(0 <= float(each.attrib["x"]) <= charts.WIDTH for each in labels)
    assert len({(each.attrib["x"], each.attrib["y"]) for each in labels}) == count
    assert text.count('class="dot on"') == 1  # all the same size: the best alone


def test_intervals_show_numbers() -> None:
    text = charts.intervals("toxic", "share", [Span("before", 0.3, 0.2, 0.4), Span("after", 0.0, 0.0, 0.0, 1)])
    assert "before: 0.300 [0.200, 0.400]" in text
    assert len(svgs(text)) == 1


def test_markdown_takes_pictures_in_and_html_not(tmp_path: Path) -> None:
    inside = tmp_path / "root" / "reports"
    inside.mkdir(parents=True)
    (inside / "a.png").write_bytes(b"picture")
    (tmp_path / "outside.png").write_bytes(b"secret")
    text = (
        f"# Title\n\n{HOSTILE}\n\n![a & b](a.png) ![gone](b.png) ![out](../../outside.png) ![web](http://x.org/x.png)"
        "\n\n| a | b |\n| --- | ---: |\n| 1 | <b> |\n\n- one\n\n    code <i>\n\n[x](javascript:alert(1))\n"
    )
    found = page_parts.markdown(text, inside, tmp_path / "root")
    assert 'alt="a &amp; b" src="data:image/png;base64,cGljdHVyZQ=="' in found
    assert found.count("<img") == 1
    assert "<h3>Title</h3>" in found and "<td>1</td>" in found and "<li>" in found
    for wrong in ("<script", "<b>", "<i>\n", "http://x.org", 'href="javascript'):
        assert wrong not in found


# --- the page of this repository


def test_the_page_has_every_stage_variant_and_number(written: Path, copy: Path) -> None:
    text = written.read_text()
    for name, stage in yaml.safe_load((copy / "dvc.yaml").read_text())["stages"].items():
        assert f">{name}</text>" in text
        assert all(
            path in text for path in (f"metrics/{name}.json", *(p for p in stage["outs"] if isinstance(p, str)))
        )
    evaluation = json.loads((copy / "metrics" / "evaluate.json").read_text())
    table = text[text.index('id="variants"') : text.index('id="size"')]
    rows = dict(re.findall(r'<tr[^>]*><th scope="row">(\w+).*?</th>(.*?)</tr>', table))
    models = page.variants(evaluation)
    assert {"base", "finetune", "ppo"} <= models.keys()
    assert list(rows) == [*models, *evaluation["baselines"]]
    for name, scores in {**models, **evaluation["baselines"]}.items():
        for score in page.SCORES:
            shown = (
                f"{scores[score]:.3f}<small>[{scores[f'{score}_low']:.3f}, {scores[f'{score}_high']:.3f}]"
                if score in scores
                else "–"
            )
            assert shown in rows[name]


def test_the_page_has_the_rest(written: Path, copy: Path) -> None:
    text = written.read_text()
    ppo = json.loads((copy / "metrics" / "ppo.json").read_text())
    assert ppo["stopped_because"] in text
    assert ("no guard events" in text) is (ppo["guard_events"] == 0)
    alignment = json.loads((copy / "metrics" / "evaluate.json").read_text())["alignment"]
    for part in ("all", "rude"):
        for when in ("before", "after"):
            scores = alignment[part][when]
            assert f"{scores['toxicity_rate']:.3f} [{scores['toxicity_rate_low']:.3f}" in text
    lock = yaml.safe_load((copy / "dvc.lock").read_text())["stages"]
    assert all(output["md5"] in text for entry in lock.values() for output in entry["outs"])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=copy, capture_output=True, text=True, check=True)
    assert f"<code>{commit.stdout.strip()[:12]}</code>, no uncommitted changes" in text
    for stage in ("base", "finetune", "reward", "ppo", "distill"):
        assert f"<h3>{stage}: " in text
    assert "<h3>Data card</h3>" in text
    assert len(svgs(text)) >= 10


def test_the_page_asks_for_nothing(written: Path) -> None:
    text = written.read_text()
    assert not re.search(r"<script|<iframe|<link rel=.stylesheet|@import|url\((?!#)", text)
    assert all(address.startswith(("data:", "#")) for address in re.findall(r'(?:src|href)="([^"]*)"', text))


def test_git_and_dvc_leave_the_page_alone(written: Path, copy: Path) -> None:
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=copy, capture_output=True, text=True, check=True
    )
    assert status.stdout == ""
    assert page.PAGE.as_posix() not in (copy / "dvc.yaml").read_text()


# --- what is missing or wrong


@pytest.mark.parametrize(
    "gone", [["metrics"], ["reports"], ["dvc.lock"], ["params.yaml"], ["metrics", "reports", "dvc.lock"]]
)
def test_missing_files_do_not_break_the_page(root: Path, gone: list[str]) -> None:
    for name in gone:
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
    text = page.html(findings.look(root))
    assert svgs(text)
    assert ("The stage evaluate has no numbers" in text) is ("metrics" in gone)
    assert ("not run" in text) is ("dvc.lock" in gone)
    assert ("No samples here yet" in text) is ("reports" in gone)


def test_broken_files_do_not_break_the_page(root: Path) -> None:
    for path in [*root.glob("metrics/*.json"), *root.glob("reports/*/*.jsonl"), *root.glob("reports/*/*.csv")]:
        path.write_text('[1, {"x": NaN,\n"step')
    for name in pipeline.read_graph(root):
        (root / ".work" / name).mkdir(parents=True, exist_ok=True)
        (root / ".work" / name / "last.json").write_text("{")
    (root / findings.MLFLOW_RUNS).write_text("[]")
    assert svgs(page.html(findings.look(root)))


def test_numbers_of_other_shapes_do_not_break_the_page(root: Path) -> None:
    for name in pipeline.read_graph(root):
        odd = {
            "bytes": "many",
            "rougeL": None,
            "alignment": [1],
            "schemes": {"a": 1},
            "guard_events": 0,
            "x": {"rougeL": 0.5},
        }
        (root / "metrics" / f"{name}.json").write_text(json.dumps(odd))
    text = page.html(findings.look(root))
    assert "0.500" in text and "no reason recorded" in text


def test_what_comes_from_data_is_escaped(root: Path) -> None:
    row = {"prompt": HOSTILE, "reference": HOSTILE, "base": HOSTILE, HOSTILE: HOSTILE}
    (root / "reports" / "evaluate" / "samples.jsonl").write_text(json.dumps(row) + "\n")
    (root / "reports" / "data.md").write_text(
        f"# {HOSTILE}\n\n{HOSTILE}\n\n    {HOSTILE}\n\n![{HOSTILE}](x.png)\n"
    )
    (root / "reports" / "ppo" / "summary.md").write_text(
        f"## The guard\n\n- step 3: warned: {HOSTILE}\n\n## Next\n"
    )
    ppo = json.loads((root / "metrics" / "ppo.json").read_text())
    (root / "metrics" / "ppo.json").write_text(
        json.dumps(ppo | {"stopped_because": HOSTILE, "guard_events": 2})
    )
    evaluation = json.loads((root / "metrics" / "evaluate.json").read_text())
    evaluation |= {
        HOSTILE: evaluation["base"],
        "about": {"tuned": HOSTILE, "task": HOSTILE, "examples": HOSTILE},
    }
    evaluation["alignment"] |= {"before": HOSTILE, "after": HOSTILE, "n": HOSTILE}
    (root / "metrics" / "evaluate.json").write_text(json.dumps(evaluation))
    with (root / "params.yaml").open("a") as file:
        file.write(f"# {HOSTILE}\n")
    text = page.html(findings.look(root))
    assert text.count("&lt;script&gt;") > 15
    assert "<script" not in text and "<img src=http" not in text
    assert "There were 2 guard events" in text and "step 3: warned" in text


def test_sizes_of_a_model_an_adapter_and_of_what_is_not_here(root: Path) -> None:
    found = findings.look(root)
    lock = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    whole = {entry["path"]: entry["size"] for each in lock.values() for entry in each["outs"]}
    distill = json.loads((root / "metrics" / "distill.json").read_text())
    assert findings.size(found, "distill") == (distill["bytes"], "metrics/distill.json")
    adapter = whole["models/finetune"] + whole["models/base"]
    assert findings.size(found, "finetune") == (adapter, "dvc.lock, adapter and base")
    assert findings.size(found, "nothing") is None

    for name, size in (("base", 1000), ("finetune", 10)):
        (root / "models" / name).mkdir(parents=True)
        (root / "models" / name / "model.safetensors").write_bytes(bytes(size))
        (root / "models" / name / "tokenizer.json").write_bytes(bytes(500))
    assert findings.size(found, "finetune") == (10, "weights")
    named = {"base_model_name_or_path": "models/base"}
    (root / "models" / "finetune" / "adapter_config.json").write_text(json.dumps(named))
    assert findings.size(found, "finetune") == (1010, "adapter and base")


# --- what MLflow knows


def test_mlflow_is_asked_once_of_each_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LIFECYCLE_TRACKING", raising=False)
    ends = {"started": "2030-01-01T10:00:00+00:00", "ended": "2030-01-01T10:01:30.5+00:00", "exit_code": 0}
    for name in ("quantize", "distill"):
        (root / ".work" / name).mkdir(parents=True, exist_ok=True)
        record = {**ends, "mlflow_run_id": f"run-{name}"}
        (root / ".work" / name / "last.json").write_text(json.dumps(record))
    end = "tokens_per_second_batch_16"
    answers = {
        "run-quantize": ({f"dense.{end}": 100.0, f"int8.{end}": 150.0, "loss": 1.0}, {}),
        "run-distill": ({"speed_ratio": 1.75}, {"prefect.flow_run_id": "flow-7"}),
    }

    def away(_ids: object) -> dict[str, tuple[dict[str, float], dict[str, str]]]:
        raise OSError("no answer")

    monkeypatch.setattr(tracking, "known", away)
    assert findings.speeds(findings.look(root)) == {}
    assert capsys.readouterr().err.count("\n") == 1

    monkeypatch.setattr(tracking, "known", lambda ids: {name: answers[name] for name in ids})
    findings.look(root)
    monkeypatch.setattr(tracking, "known", away)
    found = findings.look(root)
    assert findings.speeds(found) == {"distill": 1.75, "quantize.dense": 1.0, "quantize.int8": 1.5}
    assert found.stages["distill"].seconds == 90.5
    text = page.html(found)
    for words in ("int8 1.50×", "distill 1.75×", "flow-7", "run-quantize", "2030-01-01 10:01 UTC", "· 90 s"):
        assert words in text


@pytest.mark.filterwarnings("ignore")  # of what MLflow calls
def test_known_runs_come_with_metrics_and_tags(mlflow_store: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_store)
    run = client.create_run("0", tags={"a": "b"}).info.run_id
    client.log_metric(run, "speed_ratio", 2.0)
    found = tracking.known([run, "f" * 32])
    assert found.keys() == {run}
    assert found[run][0] == {"speed_ratio": 2.0}
    assert found[run][1]["a"] == "b"


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.known(["f" * 32]) == {}
    assert list(tmp_path.iterdir()) == []


# --- the command


def test_a_run_ends_with_the_page_and_does_not_fail_for_it(tmp_path: Path) -> None:
    toy = build(tmp_path / "toy", {"a": [], "b": ["a"]}, light=True)
    toy.dvc("repro")
    done = toy.lifecycle("run", PREFECT_HOME=str(tmp_path))
    assert done.stdout.endswith("to look at: reports/lifecycle.html\n")
    text = (toy.root / page.PAGE).read_text()
    assert text.count("up to date") >= 2 and ">b</text>" in text and "no git commit" in text
    (toy.root / page.PAGE).unlink()
    (toy.root / page.PAGE / "in-the-way").mkdir(parents=True)
    done = toy.lifecycle("run", PREFECT_HOME=str(tmp_path))
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "reports/lifecycle.html" in warnings[0]


# --- in a browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), WINDOWS)
def test_a_browser_shows_the_page(
    tab: browser.Browser, written: Path, width: int, height: int, scheme: str
) -> None:
    seen = tab.open(written, width, height, scheme).ask()
    assert tab.complaints() == []
    assert seen["overflow"] <= 0
    assert seen["pictures"] != [] and all(shown for _, shown in seen["pictures"])
    brightness = sum(int(part) for part in re.findall(r"\d+", seen["paper"])[:3])
    assert (brightness > 600) if scheme == "light" else (brightness < 150)


def test_the_browser_would_tell(tab: browser.Browser, tmp_path: Path) -> None:
    """The test above holds only as far as this does."""
    wrong = tmp_path / "wrong.html"
    wrong.write_text(
        '<img alt="gone" src="gone.png"><img alt="web" src="http://127.0.0.1:9/x.png">'
        '<p style="width:3000px">wide</p>'
        "<script>console.error('no')</script>"
    )
    seen = tab.open(wrong, 400, 900, "light").ask()
    assert seen["overflow"] > 0
    assert seen["pictures"] == [["gone", False], ["web", False]]
    told = " ".join(tab.complaints())
    assert all(words in told for words in ("consoleAPICalled", "loadingFailed", "127.0.0.1:9"))


if __name__ == "__main__":  # pictures for the eye: python tests/test_flows_page.py PAGE FOLDER
    page_file, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    with browser.started(browser.found() or "chromium", folder) as opened:
        for size in WINDOWS:
            for colours in ("light", "dark"):
                opened.open(page_file, *size, colours).picture(folder / f"page-{size[0]}-{colours}.png")
