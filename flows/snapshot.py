"""Commits of a workspace as it is, made without touching its branch or its index, and work trees of them."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tasks.stage.errors import UserError

UNTRACKED_MEGABYTES = 100  # that a snapshot takes along; more belongs into DVC
LOCAL = ".dvc/config.local"  # is about one machine, and may hold secrets
AUTHOR = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "lifecycle"), ("EMAIL", "lifecycle@localhost"))
}


def take(root: Path, message: str) -> str:
    """A commit of all that git does not ignore, changed and new files too; HEAD itself when it has all that.

    Raises UserError outside git, when `root` is not the top of its repository, and when large files are neither
    in git nor ignored.
    """
    _check(root)
    with _index(root) as environment:
        _git(root, "add", "--all", environment=environment)
        _git(root, "update-index", "--force-remove", LOCAL, environment=environment)
        tree = _git(root, "write-tree", environment=environment)
    head = revision(root, "HEAD")
    if head is not None and tree == tree_of(root, head):
        return head
    return _commit(root, tree, head, message)


def with_file(root: Path, commit: str, path: str, text: str, message: str) -> str:
    """A commit that is `commit` with another content of the file `path`."""
    blob = _git(root, "hash-object", "-w", "--stdin", text=text)
    with _index(root, commit) as environment:
        _git(root, "update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", environment=environment)
        tree = _git(root, "write-tree", environment=environment)
    return commit if tree == tree_of(root, commit) else _commit(root, tree, commit, message)


def revision(root: Path, name: str) -> str | None:
    """The full id of a commit, or None when `name` is none."""
    answer = _run(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    return answer.stdout.strip() if answer.returncode == 0 else None


def tree_of(root: Path, commit: str) -> str:
    """The id of the files of a commit: equal files, equal id."""
    return _git(root, "rev-parse", f"{commit}^{{tree}}")


def read(root: Path, commit: str, path: str) -> str | None:
    """The text of a file in a commit, or None when it has no such file."""
    answer = _run(root, "cat-file", "blob", f"{commit}:{path}")
    return answer.stdout if answer.returncode == 0 else None


def files(root: Path, commit: str, paths: Sequence[str]) -> list[str]:
    """The files that a commit has at or under `paths`."""
    found = _git(root, "ls-tree", "-r", "-z", "--name-only", commit, "--", *paths)
    return [name for name in found.split("\0") if name]


def bring(root: Path, commit: str, paths: Sequence[str]) -> None:
    """Write files of a commit into the workspace; its index and branch stay."""
    with _index(root, commit) as environment:
        _git(root, "checkout-index", "--force", "-z", "--stdin", text="\0".join(paths), environment=environment)


def name_it(root: Path, reference: str, commit: str) -> None:
    """Keep a commit under a name, so that git does not clear it away."""
    _git(root, "update-ref", reference, commit)


def forget(root: Path, prefix: str) -> None:
    """Remove all names that begin with `prefix`/."""
    for reference in _git(root, "for-each-ref", "--format=%(refname)", prefix).splitlines():
        _git(root, "update-ref", "-d", reference)


def add_tree(root: Path, folder: Path, commit: str) -> None:
    """A work tree of `commit` in `folder`; what is left there of one that was cut short goes first."""
    remove_tree(root, folder)
    _git(root, "worktree", "add", "--quiet", "--detach", str(folder), commit)


def remove_tree(root: Path, folder: Path) -> None:
    """Remove a work tree, also one that a killed run left."""
    shutil.rmtree(folder, ignore_errors=True)
    _git(root, "worktree", "prune")


def _check(root: Path) -> None:
    answer = _run(root, "rev-parse", "--show-toplevel")
    if answer.returncode != 0:
        raise UserError(f"{root} is in no git repository: `git init` it first")
    if Path(answer.stdout.strip()).resolve() != root.resolve():
        raise UserError(f"{root} is not the top of its git repository, which is {answer.stdout.strip()}")
    listed = _git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    sizes = {name: (root / name).lstat().st_size for name in listed if name and (root / name).is_file()}
    megabytes = sum(sizes.values()) / 1e6
    if megabytes > UNTRACKED_MEGABYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"{megabytes:.0f} MB of new files are neither in git nor in DVC ({largest} is the largest): "
            "`dvc add` or ignore them first"
        )


def _commit(root: Path, tree: str, parent: str | None, message: str) -> str:
    parents = ("-p", parent) if parent is not None else ()
    return _git(root, "commit-tree", tree, *parents, "-m", message, environment=AUTHOR)


@contextmanager
def _index(root: Path, commit: str | None = None) -> Iterator[dict[str, str]]:
    """The environment in which git has an index of its own: that of `commit`, or a copy of the workspace's."""
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        environment = {"GIT_INDEX_FILE": str(index)}
        if commit is not None:
            _git(root, "read-tree", commit, environment=environment)
        else:
            current = root / _git(root, "rev-parse", "--git-path", "index")
            if current.is_file():
                shutil.copyfile(current, index)
        yield environment


def _git(
    root: Path, *arguments: str, text: str | None = None, environment: Mapping[str, str] | None = None
) -> str:
    done = _run(root, *arguments, text=text, environment=environment)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"git {arguments[0]}: {said}")
    return done.stdout.strip()


def _run(
    root: Path, *arguments: str, text: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments],
        cwd=root,
        env={**os.environ, **(environment or {})},
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        text=True,
        check=False,
    )
