"""Passwords of the servers, made before their first start; `make up` calls this.

    python infra/settings.py            writes infra/.env, or adds what it lacks; no password is ever changed
    python infra/settings.py client     writes infra/client.env, with which a shell reaches the servers

Both files are for their owner alone (mode 600), and git ignores them.
"""

import base64
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

INFRA = Path(__file__).parent
PORTS = ("5443", "4443", "8443")  # of the proxy, for MLflow, Prefect and the store
MADE = (
    "POSTGRES_PASSWORD",
    "PREFECT_DATABASE_PASSWORD",
    "MLFLOW_DATABASE_PASSWORD",
    "PREFECT_PASSWORD",
    "MLFLOW_ADMIN_PASSWORD",
    "MLFLOW_SECRET_KEY",
    "STORE_KEEPER_SECRET",
    "STORE_MLFLOW_SECRET",
    "STORE_DVC_SECRET",
)


def ensure(file: Path) -> dict[str, str]:
    """The settings in `file`; those it lacks are made and added first."""
    known = read(file) if file.is_file() else {}
    made = {name: secrets.token_hex(24) for name in MADE if name not in known}
    owner = {
        "LIFECYCLE_UID": str(os.getuid()),
        "LIFECYCLE_GID": str(os.getgid()),
    }  # whose files the worker writes
    account = f"admin:{(known | made)['PREFECT_PASSWORD']}"
    forms = {"PREFECT_AUTH_STRING": account, "PREFECT_LOGIN": base64.b64encode(account.encode()).decode()}
    settings = owner | known | made | forms
    if settings != known:
        write_private(file, "".join(f"{name}={value}\n" for name, value in settings.items()))
    return settings


def read(file: Path) -> dict[str, str]:
    """The NAME=VALUE lines of a file; empty lines and comments are passed over."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {name: value for name, _, value in pairs}


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner may read, at no moment anybody else."""
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as output:
        output.write(text)
    new.replace(file)


class Addresses(NamedTuple):
    """Where clients find the servers: https://HOST:PORT."""

    mlflow: str
    prefect: str
    store: str


def addresses(host: str, ports: Sequence[str]) -> Addresses:
    """The addresses of the proxy's ports: those of MLflow, Prefect and the store."""
    return Addresses(*[f"https://{host}:{port}" for port in ports])


def client(settings: Mapping[str, str], servers: Addresses, authorities: Path | None) -> dict[str, str]:
    """The environment in which MLflow, Prefect and DVC reach the servers.

    `authorities` is a file of certificates to trust, for servers whose certificate the system does not know.
    """
    environment = {
        "MLFLOW_TRACKING_URI": servers.mlflow,
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": settings["MLFLOW_ADMIN_PASSWORD"],
        "PREFECT_API_URL": f"{servers.prefect}/api",
        "PREFECT_API_AUTH_STRING": settings["PREFECT_AUTH_STRING"],
        "AWS_ENDPOINT_URL_S3": servers.store,
        "AWS_ACCESS_KEY_ID": "dvc",
        "AWS_SECRET_ACCESS_KEY": settings["STORE_DVC_SECRET"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    if authorities is not None:
        names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "PREFECT_API_SSL_CERT_FILE")
        environment |= dict.fromkeys(names, str(authorities))
    return environment


def write_client(file: Path, environment: Mapping[str, str]) -> None:
    """Write an environment as a file for a shell to read."""
    write_private(file, "".join(f"export {name}={value}\n" for name, value in environment.items()))


def bundle(authority: Path, file: Path) -> Path:
    """Write to `file` all authorities that Python trusts, and one more: that of the proxy."""
    import certifi

    file.write_text(Path(certifi.where()).read_text(encoding="utf-8") + authority.read_text(encoding="utf-8"))
    return file


def main(arguments: list[str]) -> None:
    settings = ensure(INFRA / ".env")
    if arguments == ["client"]:
        host = settings.get("LIFECYCLE_HOST", "localhost")
        authority = INFRA / "certificates" / "authority.crt"
        trusted = bundle(authority, authority.with_name("bundle.crt")) if authority.is_file() else None
        write_client(INFRA / "client.env", client(settings, addresses(host, PORTS), trusted))


if __name__ == "__main__":
    main(sys.argv[1:])
