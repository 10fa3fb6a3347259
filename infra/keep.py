"""Backup and restore of what the servers hold: the databases of PostgreSQL and the buckets of the object store.

    python infra/keep.py buckets             make the buckets that are not there
    python infra/keep.py backup FOLDER       write all of it into a new folder
    python infra/keep.py restore FOLDER      put it back into empty servers; with --over also over what is there

Where they are, and the keys, come from the environment (PGHOST …, AWS_ENDPOINT_URL_S3 …). The dumps are taken
before the objects, which are only ever added: whatever a run in them points at is in the backup. The servers
must not run while a backup is put back. It holds the accounts of MLflow with the hashes of their passwords; the
passwords of the servers are in infra/.env.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

DATABASES = ("prefect", "mlflow", "mlflow_accounts")
BUCKETS = ("mlflow", "dvc")
MANIFEST = "manifest.json"


def ensure_buckets() -> None:
    """Make the buckets that are not there."""
    store = _store()
    there = {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}
    for name in BUCKETS:
        if name not in there:
            store.create_bucket(Bucket=name)


def backup(folder: Path) -> None:
    """Write databases and buckets into `folder`, which must not exist: it is there when all of it is in it."""
    if folder.exists():
        raise SystemExit(f"{folder} is there already: name a new folder")
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(mode=0o700, parents=True)
    for name in DATABASES:
        _run("pg_dump", "--format=custom", "--create", "--file", str(part / f"{name}.dump"), name)
    for name in BUCKETS:
        _save_bucket(name, part / f"{name}.tar")
    hashes = {path.name: _sha256(path) for path in sorted(part.iterdir())}
    (part / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    part.rename(folder)


def restore(folder: Path, over: bool) -> None:
    """Put back what `backup` wrote: databases become what they were, objects are added.

    Ends with a message, and before anything is changed, when a file was damaged or when the store holds objects
    and `over` is false.
    """
    for name, expected in json.loads((folder / MANIFEST).read_text(encoding="utf-8")).items():
        if _sha256(folder / name) != expected:
            raise SystemExit(f"{folder / name} was damaged: its SHA-256 is not that of {MANIFEST}")
    ensure_buckets()
    if not over and any(_keys(_store(), name) for name in BUCKETS):
        raise SystemExit("the store is not empty: --over puts the backup over what is there")
    for name in DATABASES:
        _run("dropdb", "--if-exists", "--force", name)
        _run("pg_restore", "--create", "--exit-on-error", "--dbname", "postgres", str(folder / f"{name}.dump"))
    for name in BUCKETS:
        _load_bucket(name, folder / f"{name}.tar")


def _save_bucket(bucket: str, file: Path) -> None:
    store = _store()
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
        for key, size in _keys(store, bucket).items():
            entry = tarfile.TarInfo(key)
            entry.size = size
            archive.addfile(entry, store.get_object(Bucket=bucket, Key=key)["Body"])


def _load_bucket(bucket: str, file: Path) -> None:
    store = _store()
    with tarfile.open(file) as archive:
        for entry in archive:  # a key never becomes a path: nothing is unpacked
            store.upload_fileobj(archive.extractfile(entry), bucket, entry.name)


def _keys(store: Any, bucket: str) -> dict[str, int]:
    """The objects of a bucket and their sizes."""
    pages = store.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {found["Key"]: found["Size"] for page in pages for found in page.get("Contents", [])}


def _store() -> Any:
    import boto3

    return boto3.client("s3")


def _run(*command: str) -> None:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip()}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str]) -> None:
    match arguments:
        case ["buckets"]:
            ensure_buckets()
        case ["backup", folder]:
            backup(Path(folder))
        case ["restore", folder]:
            restore(Path(folder), over=False)
        case ["restore", folder, "--over"]:
            restore(Path(folder), over=True)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
