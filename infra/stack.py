"""The servers of compose.yaml as plain processes, for machines without a container engine.

    python -m infra.stack FOLDER        starts them and keeps what they hold in FOLDER, until Ctrl-C

Commands, environment and files are those of compose.yaml: only names of containers become ports of this
machine. PostgreSQL, Prefect, MLflow and Caddy are the real ones; PostgreSQL and Caddy must be installed. The
object store is moto's S3 server, which checks no keys and forgets everything at its end: use it to try things.
"""

import os
import pwd
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from flows import child
from flows.processes import end_group
from infra import settings

INFRA = Path(__file__).parent
OWNER = "postgres"  # the user that Debian makes for it: PostgreSQL does not run as root
SECONDS_TO_START = 180
SECONDS_BETWEEN_LOOKS = 0.1
VARIABLE = re.compile(r"\$\{(\w+)(?::\?|:-([^}]*))?\}")
INSIDE = ("postgres:5432", "store:8333", "mlflow:5000", "prefect:4200", "127.0.0.1:2019")
OUTSIDE = ("MLFLOW_PORT", "PREFECT_PORT", "STORE_PORT")


class Stack:
    """The servers of one folder. In the environment `client` a client reaches them through the proxy."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.settings = settings.ensure(folder / ".env") | {"MLFLOW_WORKERS": "1"}
        ports = _free_ports(len(INSIDE) + len(OUTSIDE))
        self.addresses = {name: f"127.0.0.1:{port}" for name, port in zip(INSIDE, ports, strict=False)}
        self.outside = dict(zip(OUTSIDE, map(str, ports[len(INSIDE) :]), strict=True))
        self._compose = yaml.safe_load((INFRA / "compose.yaml").read_text(encoding="utf-8"))
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        authority = folder / "caddy" / "caddy" / "pki" / "authorities" / "local" / "root.crt"
        self._authority, self._trusted = authority, folder / "authorities.crt"
        servers = settings.addresses("localhost", tuple(self.outside.values()))
        self.client = settings.client(self.settings, servers, self._trusted)

    def start(self) -> None:
        """Start everything, on the databases that are in the folder, or on new ones."""
        self.start_postgres()
        self.start_store()
        self.keep("buckets")
        self.start_servers()
        self.start_proxy()

    def start_postgres(self) -> None:
        """Start PostgreSQL; the first time, make its cluster, the roles and the databases."""
        programs = postgres_programs()
        cluster, owner = self.folder / "postgres", OWNER if os.geteuid() == 0 else None
        environment = self.environment("postgres")
        new = not cluster.exists()
        if new:
            password = self.folder / "postgres.password"
            settings.write_private(password, environment["POSTGRES_PASSWORD"])
            cluster.mkdir(mode=0o700)
            if owner:
                shutil.chown(cluster, owner)
                shutil.chown(password, owner)
            manner = ("--auth=scram-sha-256", "--username=postgres", f"--pwfile={password}", "--encoding=UTF8")
            _call([str(programs / "initdb"), *manner, str(cluster)], environment, self.folder, owner)
            password.unlink()
        port = self.addresses["postgres:5432"].partition(":")[2]
        options = ("-h", "127.0.0.1", "-p", port, "-c", "unix_socket_directories=")
        self._start("postgres", [str(programs / "postgres"), "-D", str(cluster), *options], environment, owner)
        ready = [str(programs / "pg_isready"), "--host=127.0.0.1", f"--port={port}", "--quiet"]
        self._await("postgres", lambda: subprocess.run(ready, check=False).returncode == 0)
        if new:
            command = [str(programs / "psql"), "--quiet", "--no-psqlrc", "--file", str(INFRA / "databases.sql")]
            _call(command, self.keeper(), self.folder)

    def start_store(self) -> None:
        """Start an empty object store."""
        host, _, port = self.addresses["store:8333"].partition(":")
        self._start("store", child.command("moto.server", "-H", host, "-p", port), self.environment("store"))
        self._await("store", lambda: _answers(f"http://{host}:{port}/moto-api/"))

    def start_servers(self) -> None:
        """Start Prefect and MLflow."""
        for name, health in (("prefect", "prefect:4200"), ("mlflow", "mlflow:5000")):
            command = self._localized(self._compose["services"][name]["command"])
            command[command.index("--port") + 1] = self.addresses[health].partition(":")[2]
            self._start(name, child.command(*command), self.environment(name))
        self._await("prefect", lambda: _answers(f"http://{self.addresses['prefect:4200']}/api/health"))
        self._await("mlflow", lambda: _answers(f"http://{self.addresses['mlflow:5000']}/health"))

    def start_proxy(self) -> None:
        """Start the proxy, and note the authority that signs its certificates."""
        environment = self.environment("proxy") | self.outside | {"XDG_DATA_HOME": str(self.folder / "caddy")}
        command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(INFRA / "Caddyfile")]
        self._start("proxy", command, environment)
        self._await("proxy", self._authority.is_file)
        settings.bundle(self._authority, self._trusted)
        context = ssl.create_default_context(cafile=str(self._trusted))
        for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
            self._await("proxy", partial(_answers, self.client[name], context))

    def stop(self, *names: str) -> None:
        """Stop these, or all, the last one started first."""
        for name in reversed(names or tuple(self._running)):
            process = self._running.pop(name)
            if name == "postgres":
                process.send_signal(signal.SIGINT)  # at once, and cleanly
                process.wait(60)
            end_group(process, seconds=20)

    def processes(self) -> list[int]:
        """The ids of the processes of all servers."""
        leaders = [psutil.Process(leader.pid) for leader in self._running.values()]
        return [process.pid for leader in leaders for process in (leader, *leader.children(recursive=True))]

    def send(self, number: signal.Signals, *names: str) -> None:
        """Send a signal to these and their children."""
        for name in names:
            os.killpg(self._running[name].pid, number)

    def keep(self, *arguments: str) -> None:
        """Carry out infra/keep.py."""
        _call([sys.executable, str(INFRA / "keep.py"), *arguments], self.keeper(), self.folder)

    def keeper(self) -> dict[str, str]:
        """The environment of infra/keep.py: PostgreSQL's programs, and the keys of everything."""
        host, _, port = self.addresses["postgres:5432"].partition(":")
        environment = self.environment("postgres") | self.environment("keeper")
        path = f"{postgres_programs()}{os.pathsep}{environment['PATH']}"
        return environment | {"PGHOST": host, "PGPORT": port, "PATH": path}

    def environment(self, service: str) -> dict[str, str]:
        """The environment of a service: ours, and what compose.yaml gives it."""
        own = self._compose["services"][service].get("environment", {})
        values = {name: self._localize(value) for name, value in own.items()}
        for config in self._compose["services"][service].get("configs", ()):
            values = {
                name: str(self._config(config["source"])) if value == config["target"] else value
                for name, value in values.items()
            }
        root = str(INFRA.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": path, **values}

    def _config(self, name: str) -> Path:
        file = self.folder / name
        settings.write_private(file, self._localize(self._compose["configs"][name]["content"]))
        return file

    def _localized(self, command: Sequence[str]) -> list[str]:
        return [self._localize(argument) for argument in command]

    def _localize(self, text: str) -> str:
        """Fill in the variables as Compose does, and replace the containers' addresses by ours."""
        text = VARIABLE.sub(lambda found: self.settings.get(found[1]) or found[2] or _missing(found[1]), text)
        for port, name in ((5443, "MLFLOW_PORT"), (4443, "PREFECT_PORT"), (8443, "STORE_PORT")):
            text = text.replace(f"localhost:{port}", f"localhost:{self.outside[name]}")
        for name, address in self.addresses.items():
            text = text.replace(name, address)
        return text.replace("0.0.0.0", "127.0.0.1")  # a container's every address is its own  # noqa: S104

    def _start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], user: str | None = None
    ) -> None:
        log = self.folder / f"{name}.log"
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            self._running[name] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **_identity(user),
            )

    def _await(self, name: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS_TO_START
        while not ready():
            if self._running[name].poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{name} did not start: see {self.folder / name}.log")
            time.sleep(SECONDS_BETWEEN_LOOKS)


@contextmanager
def started(folder: Path) -> Iterator[Stack]:
    """The whole stack, for as long as the block lasts."""
    stack = Stack(folder)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


def postgres_programs() -> Path:
    """The folder of PostgreSQL's programs: the newest of Debian's, else that of the `postgres` on the path."""
    installed = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    if installed:
        return max(installed, key=lambda path: int(path.parent.name))
    if program := shutil.which("postgres"):
        return Path(program).parent
    raise SystemExit("PostgreSQL is not installed: no `postgres` on the path")


def _call(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, user: str | None = None
) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        **_identity(user),
    )
    if done.returncode:
        raise SystemExit(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()}")


def _identity(user: str | None) -> dict[str, Any]:
    """How a process becomes `user`, in no group of ours; None: it stays who we are."""
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}


def _answers(url: str, context: ssl.SSLContext | None = None) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5, context=context).close()  # noqa: S310
    except urllib.error.HTTPError as answer:
        return answer.code < 500
    except OSError:
        return False
    return True


def _missing(name: str) -> str:
    raise SystemExit(f"compose.yaml wants {name}, which infra/settings.py does not make")


def _free_ports(number: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody uses now, all different."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit(
            "python -m infra.stack FOLDER: name the folder in which the servers keep what they hold"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve(Path(arguments[0]).resolve())
    except KeyboardInterrupt:
        sys.stderr.write("all have ended\n")


def serve(folder: Path) -> None:
    """Start the servers, say where they are, and end them at KeyboardInterrupt."""
    with started(folder) as stack:
        file = stack.folder / "client.env"
        settings.write_client(file, stack.client)
        sys.stdout.write(
            f"MLflow   {stack.client['MLFLOW_TRACKING_URI']}\n"
            f"Prefect  {stack.client['PREFECT_API_URL'].removesuffix('/api')}\n"
            f"the passwords: {stack.folder / '.env'}; for clients: . {file}\nCtrl-C ends all\n"
        )
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1:])
