"""A registered version answers as the model does, wherever it is loaded, and refuses what it cannot answer."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lm_toys import COMPUTE, FAMILIES, OPTIONS, shake, toy

from flows import server
from tasks.lm.model import LanguageModel, load, save
from tasks.lm.peft import adapt
from tasks.lm.respond import respond
from tasks.registry import store
from tasks.registry.card import card
from tasks.registry.register import (
    QUANTISERS,
    Licences,
    Params,
    copy_code,
    pack,
    pack_model,
    requirements,
    size,
)
from tasks.stage import ParamsError, UserError
from tasks.stage.files import write_json
from tasks.stage.fingerprint import hash_path

ROOT = Path(__file__).parents[1]
PROMPTS = ["#Person1#: Hello there, how are you?", "Hi", "#Person2#: I will bring the cake on Friday."]
GENERATION = {"do_sample": False, "num_beams": 1, "max_new_tokens": 6}
SETTINGS: dict[str, Any] = {
    "generation": GENERATION,
    "batch_size": 8,
    "max_prompt_tokens": 64,
    "limits": {"prompts": 4, "characters": 200, "max_new_tokens": 12},
    "seed": 1,
    "compute": COMPUTE.model_dump(),
    "int8_kernels": False,
}
SCORES = {"rougeL": 0.5, "rougeL_low": 0.4, "rougeL_high": 0.6}
EVALUATION: dict[str, Any] = {
    "about": {"task": "summarize", "examples": 40},
    "base": SCORES,
    "tuned": SCORES,
    "baselines": {"lead_1": SCORES},
    "tasks": {name: {"summarize": SCORES, "act": SCORES} for name in ("base", "tuned")},
}
LINEAGE: dict[str, Any] = {
    "variant": "tuned",
    "stage": "tune",
    "targets": ["tune", "evaluate"],
    "commit": "0123456789abcdef",
    "dirty": False,
    "commands": {"tune": "python -m tasks.tune"},
    "params": {"tune": {"epochs": 1}},
    "inputs": {"inputs": "aa.dir"},
    "outputs": {"models/tuned": "bb.dir", "metrics/tune.json": "cc"},
}
LICENCES = Licences(model="MIT", data="CC BY 4.0")

# MLflow warns of type hints of its own when it is imported.
MLFLOW_WARNING = "ignore:.*Any type hint is inferred as AnyType:UserWarning"
pytestmark = pytest.mark.filterwarnings(MLFLOW_WARNING)


def tuned(family: str, folder: Path, method: str = "lora") -> Path:
    """An adapter, and the base it names, in `folder`."""
    save(toy(family), folder / "base")
    lm = load(folder / "base", COMPUTE, trainable=True)
    lm = adapt(lm, method, OPTIONS[method] | ({"dropout": 0.0} if method == "lora" else {}))
    shake(lm)
    save(lm, folder / "tuned")
    return folder / "tuned"


def packed(model: Path, folder: Path, adapter: Any = "merged") -> Path:
    """All that a version holds."""
    target = folder / "packed"
    target.mkdir()
    pack_model(model, target / "model", adapter, COMPUTE)
    known = LINEAGE | {"model": {"bytes": size(target / "model"), "sha256": hash_path(target / "model")}}
    text = card("toy", known, EVALUATION, SETTINGS, LICENCES)
    pack(target, settings=SETTINGS, prompts=PROMPTS, evaluation=EVALUATION, lineage=known, card=text)
    return target


def registered(folder: Path, target: Path, name: str = "toy") -> store.Version:
    """The packed folder as a version."""
    code = folder / "tasks"
    copy_code(code)
    version = store.add(
        name, target, code,
        example=[{"prompt": PROMPTS[0], "max_new_tokens": 4}],
        requirements=requirements(target / "model"),
        description=(target / "README.md").read_text(),
        tags={"variant": "tuned"},
        metrics={"rougeL": 0.5},
    )  # fmt: skip
    shutil.rmtree(code)
    return version


def answers(lm: LanguageModel, prompts: list[str] = PROMPTS, seed: int = 1, **changes: Any) -> list[str]:
    return respond(
        lm,
        prompts,
        GENERATION | changes,
        batch_size=8,
        seed=seed,
        max_prompt_tokens=SETTINGS["max_prompt_tokens"],
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["merged", "separate"])
def test_a_packed_adapter_needs_no_other_folder_and_answers_the_same(
    family: str, adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.registry.answering import open_packed

    model = tuned(family, tmp_path / "models")
    expected = answers(load(model, COMPUTE))
    assert expected != answers(load(tmp_path / "models" / "base", COMPUTE))
    target = packed(model, tmp_path, adapter)
    shutil.rmtree(tmp_path / "models")
    assert answers(open_packed(target / "model", COMPUTE)) == expected
    assert (target / "model" / "model.safetensors").is_file() == (adapter == "merged")
    assert [path for path in target.rglob("*") if path.suffix in (".bin", ".pkl", ".pt", ".py")] == []


def test_an_int8_model_answers_with_integers_where_it_is_asked_to(tmp_path: Path) -> None:
    from tasks.compress.formats import save_integers
    from tasks.compress.kernels import Int8Linear
    from tasks.compress.schemes import BITS
    from tasks.registry.answering import Answering, Request, open_packed

    save(toy("t5"), tmp_path / "dense")
    save_integers(load(tmp_path / "dense", COMPUTE), tmp_path / "int8", BITS["int8"], None)
    target = packed(tmp_path / "int8", tmp_path)
    write_json(target / "settings.json", SETTINGS | {"int8_kernels": True})
    served = Answering()
    served.load_context(SimpleNamespace(artifacts={"packed": str(target)}))
    assert any(isinstance(module, Int8Linear) for module in served.lm.model.modules())
    assert len(served.predict([Request(prompt=prompt) for prompt in PROMPTS])) == len(PROMPTS)
    with pytest.raises(UserError, match="holds no int8 weights; run quantize with scheme: int8"):
        open_packed(tmp_path / "dense", COMPUTE, int8_kernels=True)


def test_the_code_of_a_version_is_whole(tmp_path: Path) -> None:
    copy_code(tmp_path / "tasks")
    program = "import tasks.compress.kernels as one, tasks.lm.respond as two; print(one.__file__, two.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.count(str(tmp_path)) == 2


def test_virtual_tokens_cannot_be_merged_and_are_kept_apart(tmp_path: Path) -> None:
    from tasks.registry.answering import open_packed

    model = tuned("llama", tmp_path / "models", "prompt_tuning")
    with pytest.raises(ParamsError, match="virtual tokens"):
        pack_model(model, tmp_path / "merged", "merged", COMPUTE)
    pack_model(model, tmp_path / "separate", "separate", COMPUTE)
    assert answers(open_packed(tmp_path / "separate", COMPUTE)) == answers(load(model, COMPUTE))
    assert (tmp_path / "separate" / "adapter_model.safetensors").read_bytes() == (
        model / "adapter_model.safetensors"
    ).read_bytes()


def test_a_base_that_is_not_here_cannot_be_kept_apart(tmp_path: Path) -> None:
    model = tuned("t5", tmp_path / "models")
    config = model / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "models" / "base"), "google/flan-t5-base"))
    with pytest.raises(UserError, match=r"google/flan-t5-base.*register\.adapter to merged"):
        pack_model(model, tmp_path / "packed", "separate", COMPUTE)


def test_the_libraries_of_a_quantised_model_are_pinned_too(tmp_path: Path) -> None:
    for method in ("compressed-tensors", "bitsandbytes", None):
        config = {"quantization_config": {"quant_method": method}} if method else {}
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = requirements(tmp_path)
        assert all("==" in line for line in found)
        pinned = {line.split("==")[0] for line in found} & set(QUANTISERS)
        assert pinned == ({method} if method else set())


def test_the_card_has_scores_terms_and_origin() -> None:
    text = card("toy", LINEAGE | {"dirty": True}, EVALUATION, SETTINGS, LICENCES)
    for words in (
        "# toy: tuned",
        "ROUGE-L",
        "0.500",
        "lead_1",
        "act",
        "MIT",
        "CC BY 4.0",
        "`models/tuned` bb.dir",
    ):
        assert words in text
    assert "`0123456789abcdef` with uncommitted changes" in text
    assert "cc" not in text.split("dvc.lock")[1]


def test_the_params_of_this_repository_name_a_variant_without_worked_examples() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    section = Params.model_validate(params["register"])
    assert params["evaluate"]["variants"][section.variant]["shots"] == 0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Any:
    """A version in a store of its own, with the model it was made of: (version, folder, expected answers)."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(mlflow_template, folder / 'mlflow.db')}")
        model = tuned("t5", folder / "models")
        version = registered(folder, packed(model, folder, "separate"))
        yield version, folder, load(model, COMPUTE)


def test_a_version_is_the_challenger_with_tags_card_and_signature(served: Any) -> None:
    _, folder, _ = served
    found = store.find("toy", "challenger")
    assert (found.number, found.tags["variant"], found.aliases) == ("1", "tuned", ("challenger",))
    assert store.read(found, "README.md").startswith("# toy: tuned")
    with pytest.raises(UserError, match=r"no version champion .* it has 1"):
        store.find("toy", "champion")
    assert store.look("nothing", "1") is None
    stored = yaml.safe_load((store.download(found, folder / "stored") / "MLmodel").read_text())
    [request] = json.loads(stored["signature"]["inputs"])
    assert request["properties"]["prompt"] == {"type": "string", "required": True}
    assert request["properties"]["max_new_tokens"] == {"type": "long", "required": False}
    pins = (folder / "stored" / "requirements.txt").read_text().splitlines()
    assert pins and all("==" in line for line in pins)
    assert [path.name for path in (folder / "stored").rglob("*.pkl")] == []
    assert (folder / "stored" / "input_example.json").is_file()


def test_a_loaded_version_answers_as_the_model_does(served: Any) -> None:
    import mlflow

    version, _, lm = served
    model = mlflow.pyfunc.load_model(version.uri)
    assert model.predict([{"prompt": prompt} for prompt in PROMPTS]) == answers(lm)
    longer = model.predict([{"prompt": PROMPTS[0], "max_new_tokens": 12}, {"prompt": PROMPTS[1]}])
    assert longer == [*answers(lm, PROMPTS[:1], max_new_tokens=12), answers(lm, PROMPTS[1:2])[0]]
    sampling = {"do_sample": True, "temperature": 2.0}
    for seed in (1, 2):
        asked = [{"prompt": prompt, "seed": seed, **sampling} for prompt in PROMPTS]
        assert model.predict(asked) == answers(lm, PROMPTS, seed, **sampling)


BAD = [
    ({"prompt": "x", "temprature": 1.0}, "temprature: no such setting; did you mean temperature?"),
    ({"max_new_tokens": 3}, "prompt: missing"),
    ({"prompt": "x", "max_new_tokens": "many"}, "max_new_tokens: Input should be a valid integer"),
    ({"prompt": "x", "max_new_tokens": 13}, "max_new_tokens is 13; at most 12 is allowed"),
    ({"prompt": "x", "top_p": 2.0}, "top_p: Input should be less than or equal to 1"),
    ({"prompt": "x", "do_sample": False, "temperature": 0.5}, "temperature"),
    ({"prompt": ""}, "prompt: String should have at least 1 character"),
    ({"prompt": "x" * 201}, "prompt 0 has 201 characters; 200 are allowed"),
    ("x", "Expecting example to be a dictionary"),
]
BODIES = [(json.dumps({"inputs": [request]}), reason) for request, reason in BAD] + [
    (json.dumps({"inputs": [{"prompt": "x"}] * 5}), "5 prompts in one request; at most 4 are allowed"),
    (json.dumps({"prompt": "x"}), "Expected list"),
    (json.dumps({"rows": [{"prompt": "x"}]}), "'inputs'"),
    ('{"inputs": [', "JSON"),
]


@pytest.mark.parametrize(("body", "reason"), BODIES)
def test_a_bad_request_gets_a_4xx_with_the_reason(client: Any, body: str, reason: str) -> None:
    answer = client.post("/invocations", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert reason in answer.json()["message"]
    assert "Traceback" not in answer.text and "stack_trace" not in answer.text


def test_a_good_request_is_answered(client: Any, served: Any) -> None:
    answer = client.post("/invocations", json={"inputs": [{"prompt": prompt} for prompt in PROMPTS]})
    assert (answer.status_code, answer.json()) == (200, {"predictions": answers(served[2])})
    assert client.get("/health").status_code == 200


@pytest.fixture(scope="module")
def client(served: Any) -> Any:
    """MLflow's scoring server in this process."""
    import mlflow
    from mlflow.pyfunc.scoring_server import init
    from starlette.testclient import TestClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
        yield TestClient(init(mlflow.pyfunc.load_model(served[0].uri)))


def test_mlflow_serves_a_version_away_from_this_repository(served: Any, tmp_path: Path) -> None:
    """In a folder of its own and with no path to this repository, so that the code is the version's own."""
    version, _, lm = served
    port = server.free_port()
    options = ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", version.uri, *options],
        cwd=tmp_path, env={**os.environ, "PATH": path}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        body = json.dumps({"inputs": [{"prompt": prompt} for prompt in PROMPTS]}).encode()
        found = json.loads(_post(f"http://127.0.0.1:{port}/invocations", body, process))
        assert found == {"predictions": answers(lm)}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)


def _post(url: str, body: bytes, process: "subprocess.Popen[str]") -> bytes:
    """The answer, once the server has come up."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    end = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(request) as answer:
                found: bytes = answer.read()
                return found
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end, "the server does not come up"
            time.sleep(0.2)
