"""The files of infra/ hold to what docs/security.md says, as far as shows without a cluster or an engine."""

import base64
import itertools
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import kubernetes_validate
import pytest
import yaml
from prefect.utilities.templating import apply_values

from infra import settings
from infra.stack import VARIABLE

INFRA = Path(__file__).parents[1] / "infra"
COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text(encoding="utf-8"))
TEMPLATE: dict[str, Any] = json.loads(
    (INFRA / "kubernetes" / "base-job-template.json").read_text(encoding="utf-8")
)
DOCKER_TEMPLATE: dict[str, Any] = json.loads((INFRA / "docker-job-template.json").read_text(encoding="utf-8"))
ONCE = {"keeper"}
SECRET = re.compile(r"PASSWORD|SECRET|KEY$|TOKEN|LOGIN|AUTH_STRING|CONNECTION_URL|STORE_URI")
NAMES_A_SECRET = re.compile(r"ACCESS_KEY_ID$|^PREFECT_INTEGRATIONS_KUBERNETES_WORKER_\w+_SECRET_(NAME|KEY)$")
KUBERNETES = ("1.31", "1.37")  # the first one in which jobs have a podFailurePolicy for good, and a new one
PROGRAMS = Path(sys.executable).parent


@cache
def manifests() -> list[dict[str, Any]]:
    files = sorted((INFRA / "kubernetes").glob("*.yaml"))
    return [found for file in files for found in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod) of each workload, and of the jobs of the work pool."""
    for found in manifests():
        if found["kind"] in ("Deployment", "StatefulSet"):
            yield found["metadata"]["name"], found["spec"]["template"]["spec"]
        if found["kind"] == "CronJob":
            yield found["metadata"]["name"], found["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    yield "run", TEMPLATE["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, pod in pods():
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            yield f"{name}/{container['name']}", container


def test_compose_yaml_is_what_the_specification_of_compose_allows() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, INFRA / "compose.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_compose_itself_accepts_the_file(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if (
        not docker
        or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs docker's compose plugin")
    settings.ensure(tmp_path / ".env")
    command = [
        docker,
        "compose",
        "--env-file",
        tmp_path / ".env",
        "--file",
        INFRA / "compose.yaml",
        "config",
        "-q",
    ]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_is_pinned_watched_started_again_and_keeps_its_data(name: str) -> None:
    service = COMPOSE["services"][name]
    assert re.search(r":\d+\.\d+(\.\d+)?(-\w+)?$", service["image"]), "an image has a whole version"
    assert service["security_opt"] == ["no-new-privileges:true"]
    if name in ONCE:
        assert service["restart"] == "no"
    else:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"
    named = {volume.partition(":")[0] for volume in service.get("volumes", ()) if volume[0].isalpha()}
    assert named <= set(COMPOSE["volumes"])
    assert named or name not in ("postgres", "store", "proxy")


def test_only_the_proxy_has_ports_and_they_are_on_loopback_unless_asked() -> None:
    ports = {name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service}
    assert list(ports) == ["proxy"]
    for port in ports["proxy"]:
        assert port.startswith("${LIFECYCLE_BIND:-127.0.0.1}:")


def test_networks_let_nobody_out_but_the_worker_and_the_proxy() -> None:
    open_ones = {name for name, network in COMPOSE["networks"].items() if not network.get("internal")}
    out = {name for name, service in COMPOSE["services"].items() if open_ones & set(service["networks"])}
    assert out == {"worker", "proxy"}
    assert "databases" not in COMPOSE["services"]["worker"]["networks"]


def test_no_service_has_a_password_that_is_written_here_or_has_a_default() -> None:
    for name, service in COMPOSE["services"].items():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable) and not NAMES_A_SECRET.search(variable):
                used = [found for found in VARIABLE.finditer(value) if found[0].endswith(":?}")]
                assert used, f"{name}: {variable} is not taken from the settings"
    needed = {found[1] for found in VARIABLE.finditer((INFRA / "compose.yaml").read_text()) if ":?" in found[0]}
    assert needed == {*settings.MADE, "PREFECT_LOGIN"}


def test_the_settings_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    made = settings.ensure(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert all(len(made[name]) == 48 for name in settings.MADE)
    assert len({made[name] for name in settings.MADE}) == len(settings.MADE)
    assert made["PREFECT_AUTH_STRING"] == f"admin:{made['PREFECT_PASSWORD']}"
    assert base64.b64decode(made["PREFECT_LOGIN"]).decode() == made["PREFECT_AUTH_STRING"]
    assert settings.ensure(file) == made
    assert settings.ensure(tmp_path / "other") != made


def test_settings_that_are_new_are_added_to_those_that_a_person_chose(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("# ours\nLIFECYCLE_HOST=models.example.org\nPREFECT_PASSWORD=chosen\n")
    made = settings.ensure(file)
    assert (made["LIFECYCLE_HOST"], made["PREFECT_PASSWORD"]) == ("models.example.org", "chosen")
    assert set(settings.MADE) < set(settings.read(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_git_ignores_what_holds_secrets(repository: Path) -> None:
    for name in (
        "infra/.env",
        "infra/client.env",
        "infra/backups/one/mlflow.dump",
        "infra/certificates/key.pem",
    ):
        done = subprocess.run(
            ["git", "check-ignore", "--quiet", "--no-index", name], cwd=repository, check=False
        )
        assert done.returncode == 0, name


def test_the_image_gets_only_what_it_needs_and_runs_as_nobody_special(repository: Path) -> None:
    lines = (INFRA / "Dockerfile").read_text().splitlines()
    commands = [line.split(maxsplit=1) for line in lines if re.match(r"[A-Z]+ ", line)]
    assert commands[0][0] == "FROM"
    assert re.search(r":\d+\.\d+\.\d+-", commands[0][1])
    assert [what for word, what in commands if word == "USER"] == ["1000"]
    assert not any(word == "ADD" for word, _ in commands)
    copied = itertools.chain.from_iterable(what.split()[:-1] for word, what in commands if word == "COPY")
    allowed = {line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert set(copied) == allowed
    assert all((repository / path).exists() for path in allowed)


def test_hadolint_finds_no_fault_in_the_image() -> None:
    done = subprocess.run(
        [PROGRAMS / "hadolint", INFRA / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def rendered(template: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The job that a worker makes of a template, with the defaults of its variables."""
    properties = template["variables"]["properties"]
    defaults = {name: variable["default"] for name, variable in properties.items()}
    found: dict[str, Any] = apply_values(template["job_configuration"], defaults | values)
    return found


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_each_field_of_each_manifest(version: str) -> None:
    job = rendered(TEMPLATE, name="run", command=["prefect", "flow-run", "execute"], gpus=4)["job_manifest"]
    for needless in ("parallelism", "completions"):  # Prefect's worker refuses a template without them
        assert job["spec"]["template"]["spec"].pop(needless) == 1
    for manifest in [*manifests(), job]:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize(
    ("name", "container"), list(containers()), ids=lambda value: value if type(value) is str else ""
)
def test_a_container_in_the_cluster_is_pinned_and_has_no_rights_and_no_passwords(
    name: str, container: dict[str, Any]
) -> None:
    assert container["image"] == "{{ image }}" or re.search(r":\d+\.\d+(\.\d+)?(-\S+)?$", container["image"])
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    for variable in container.get("env", ()):
        name_of = variable["name"]
        if SECRET.search(name_of) and not NAMES_A_SECRET.search(name_of):
            secret = "secretKeyRef" in variable.get("valueFrom", {})
            assert secret or re.search(r"\$\((PREFECT|MLFLOW)_\w*PASSWORD\)", variable["value"]), name_of


def test_every_secret_that_the_cluster_wants_is_made() -> None:
    wanted = set(re.findall(r"secretKeyRef: \{name: lifecycle, key: (\w+)\}", all_text()))
    jobs = {entry["valueFrom"]["secretKeyRef"]["key"] for entry in job()["env"] if "valueFrom" in entry}
    forms = {"PREFECT_LOGIN", "PREFECT_AUTH_STRING"}  # of PREFECT_PASSWORD
    assert wanted | jobs == {*settings.MADE, *forms} - {"PREFECT_PASSWORD"}


def all_text() -> str:
    return "".join(file.read_text() for file in sorted((INFRA / "kubernetes").glob("*.yaml")))


def job() -> dict[str, Any]:
    found: dict[str, Any] = dict(pods())["run"]["containers"][0]
    return found


def test_pods_run_without_root_and_only_the_worker_may_speak_to_the_cluster() -> None:
    for name, pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod.get("automountServiceAccountToken", True) is (name == "worker"), name


def test_nothing_is_reachable_from_outside_the_cluster_unless_asked() -> None:
    kinds = [found["spec"].get("type", "ClusterIP") for found in manifests() if found["kind"] == "Service"]
    assert set(kinds) == {"ClusterIP"}


def test_cluster_and_compose_run_the_same_images_and_the_same_servers() -> None:
    images = {service["image"] for service in COMPOSE["services"].values()}
    assert {container["image"] for _, container in containers()} - {"{{ image }}"} - images == {
        "prefecthq/prefect:3.8.8-python3.11-kubernetes"
    }
    assert "prefect==3.8.8\n" in (INFRA.parent / "requirements.lock").read_text()
    for name in ("mlflow", "prefect"):
        in_cluster = next(found["args"] for path, found in containers() if path == f"{name}/{name}")
        in_compose = COMPOSE["services"][name]["command"]
        assert [word for word in in_cluster if word.startswith("--")] == [
            word for word in in_compose if word.startswith("--")
        ]


def test_a_job_gets_its_gpus_its_memory_and_the_volume_on_which_a_preempted_one_goes_on() -> None:
    spec = TEMPLATE["job_configuration"]["job_manifest"]["spec"]
    pod = spec["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in job()["volumeMounts"]}
    assert mounts["/workspace"]["persistentVolumeClaim"]["claimName"] == "{{ claim }}"
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "{{ shared_memory }}"}
    assert job()["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"
    assert pod["nodeSelector"] == "{{ node_selector }}"
    assert spec["podFailurePolicy"]["rules"][0] == {
        "action": "Ignore",  # the job starts another pod, without counting this one as a failure
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    claims = [found["metadata"]["name"] for found in manifests() if found["kind"] == "PersistentVolumeClaim"]
    assert TEMPLATE["variables"]["properties"]["claim"]["default"] in claims


def test_the_worker_writes_its_login_into_no_job_and_watches_its_own_namespace() -> None:
    worker = next(found for path, found in containers() if path == "worker/worker")
    environment = {entry["name"]: entry for entry in worker["env"]}
    prefix = "PREFECT_INTEGRATIONS_KUBERNETES"
    login = environment["PREFECT_API_AUTH_STRING"]["valueFrom"]["secretKeyRef"]
    assert environment[f"{prefix}_WORKER_API_AUTH_STRING_SECRET_NAME"]["value"] == login["name"]
    assert environment[f"{prefix}_WORKER_API_AUTH_STRING_SECRET_KEY"]["value"] == login["key"]
    assert environment[f"{prefix}_OBSERVER_NAMESPACES"]["valueFrom"] == {
        "fieldRef": {"fieldPath": "metadata.namespace"}
    }


@pytest.mark.parametrize("template", [TEMPLATE, DOCKER_TEMPLATE], ids=["kubernetes", "docker"])
def test_every_variable_of_a_template_is_used_and_every_use_is_a_variable(template: dict[str, Any]) -> None:
    text = json.dumps(template["job_configuration"])
    assert set(re.findall(r"\{\{ (\w+) \}\}", text)) == set(template["variables"]["properties"])


def test_a_container_of_the_docker_pool_has_no_rights_and_takes_its_passwords_from_a_file() -> None:
    container = rendered(DOCKER_TEMPLATE, workspace="/srv/ours")
    assert container["image"] == COMPOSE["x-project-image"]["image"]
    assert container["volumes"] == ["/srv/ours:/srv/ours"]
    assert container["env"] == {}
    assert shlex.split(container["command"])[:2] == ["sh", "-c"]
    assert shlex.split(container["command"])[2].startswith(". infra/client.env && ")
    more = container["container_create_kwargs"]
    assert (more["working_dir"], more["cap_drop"], more["security_opt"]) == (
        "/srv/ours", ["ALL"], ["no-new-privileges:true"]
    )  # fmt: skip


class Osv(BaseHTTPRequestHandler):
    """Knows one hole, in one package."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
        self.asked.append(name)
        hole = {"id": "OSV-1", "affected": [{"package": {"name": name, "ecosystem": "PyPI"}, "ranges": []}]}
        answer = json.dumps({"vulns": [hole]} if name == "holey" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None: ...


def test_the_audit_reports_known_holes_once_a_day_and_fails_for_none_and_without_network(
    repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "infra").mkdir()
    shutil.copy(repository / "infra" / "audit", tmp_path / "infra")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(PROGRAMS)
    lock = tmp_path / "requirements.lock"
    lock.write_text("holey==1.0\nwhole==2.0\n")

    def audit(address: str) -> str:
        environment = {**os.environ, "LIFECYCLE_OSV": address}
        done = subprocess.run(
            [tmp_path / "infra" / "audit"], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    with ThreadingHTTPServer(("127.0.0.1", 0), Osv) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/v1/query"
        assert re.search(
            r"Found 1 known vulnerability in 1 package\n.*\nholey +1\.0 +OSV-1", audit(address), re.S
        )
        assert Osv.asked == ["holey", "whole"]
        assert "OSV-1" in audit(address)
        assert Osv.asked == ["holey", "whole"]
        server.shutdown()
    lock.write_text("whole==2.0\n")
    later = (tmp_path / ".work" / "audit.txt").stat().st_mtime + 1
    os.utime(lock, (later, later))
    assert audit(address) == (
        "no audit of the packages: OSV did not answer (.work/audit.txt.new has the reason)\n"
    )


def test_kustomize_puts_it_all_together() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl")
    done = subprocess.run([kubectl, "kustomize", INFRA], capture_output=True, text=True, check=True)
    built = list(yaml.safe_load_all(done.stdout))
    kinds = [found["kind"] for found in built]
    assert sorted(kinds) == sorted([found["kind"] for found in manifests()] + ["ConfigMap"] * 4)
    assert {found["metadata"]["namespace"] for found in built} == {"lifecycle"}
