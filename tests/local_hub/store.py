"""What the Hub keeps on disk: content-addressed blobs and, per repository, commits that are only ever added.

Every file appears by a rename, a commit becomes visible only when its branch is replaced, and so a process
killed at any moment leaves each repository at its old or at its new state.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from .errors import HubError, revision_not_found

REPO_TYPES = ("model", "dataset", "space")
LFS_SUFFIXES = (
    "bin",
    "ckpt",
    "gz",
    "h5",
    "npy",
    "npz",
    "onnx",
    "parquet",
    "pkl",
    "pt",
    "pth",
    "safetensors",
    "tar",
    "zip",
)
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class FileEntry:
    """One file of one commit; `oid` is git's id of the file or, for LFS, of its pointer."""

    sha256: str
    size: int
    oid: str
    lfs: bool


@dataclass(frozen=True)
class Commit:
    """A commit and all files of the repository at that point."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, FileEntry]


def now() -> str:
    """The present moment as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def write_atomically(path: Path, content: bytes) -> None:
    """Give `path` this content in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def git_blob_id(content: bytes) -> str:
    """The id that git gives to this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The small text that git keeps in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Blobs:
    """Content by its sha256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, sha256: str) -> Path:
        """Where the content with this sha256 is or would be."""
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise HubError(400, f"not a sha256: {sha256}")
        return self.folder / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        """Whether the content is here."""
        return self.path(sha256).is_file()

    def put(self, content: bytes) -> str:
        """Keep this content and return its sha256."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.has(sha256):
            write_atomically(self.path(sha256), content)
        return sha256

    def adopt(self, temporary: Path, sha256: str) -> None:
        """Move a finished file here; refused, and the file removed, unless its sha256 is as announced."""
        with temporary.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            temporary.unlink()
            raise HubError(422, f"content has sha256 {found}, announced was {sha256}")
        self.path(sha256).parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(self.path(sha256))

    def regular_file(self, content: bytes) -> FileEntry:
        """Keep a file that git holds itself."""
        return FileEntry(self.put(content), len(content), git_blob_id(content), lfs=False)

    def lfs_file(self, sha256: str) -> FileEntry:
        """An uploaded LFS file; refused while its content is not here."""
        if not self.has(sha256):
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = self.path(sha256).stat().st_size
        return FileEntry(sha256, size, git_blob_id(lfs_pointer(sha256, size)), lfs=True)


class Repo:
    """One repository: settings, commits and the names that point to them."""

    def __init__(self, folder: Path, repo_type: str, repo_id: str, before_step: Callable[[str], None]) -> None:
        self.folder = folder
        self.type = repo_type
        self.id = repo_id
        self.owner = repo_id.split("/")[0]
        self.before_step = before_step

    @property
    def settings(self) -> dict[str, Any]:
        """private (bool), gated (False, "auto" or "manual"), granted (users), createdAt, sdk."""
        document: dict[str, Any] = json.loads((self.folder / "settings.json").read_bytes())
        return document

    def change_settings(self, **changes: object) -> None:
        """Replace some of the settings."""
        write_atomically(self.folder / "settings.json", json.dumps(self.settings | changes).encode())

    def refs(self, kind: str) -> dict[str, str]:
        """Names and commit ids; kind is "heads", "tags" or "pr"."""
        files = sorted((self.folder / "refs" / kind).glob("*"))
        return {unquote(file.name): file.read_text() for file in files if not file.name.startswith(".")}

    def set_ref(self, kind: str, name: str, commit_id: str) -> None:
        """Let a name point to a commit."""
        if not re.fullmatch(r"\w[\w./-]*", name) or ".." in name:
            raise HubError(400, f"Invalid reference name: {name}")
        write_atomically(self.folder / "refs" / kind / quote(name, safe=""), commit_id.encode())

    def delete_ref(self, kind: str, name: str) -> None:
        """Forget a name."""
        if name not in self.refs(kind):
            raise revision_not_found(name)
        (self.folder / "refs" / kind / quote(name, safe="")).unlink()

    def commit_id(self, revision: str) -> str:
        """The commit that a branch, a tag, refs/pr/N, or the first seven or more digits of an id stand for."""
        for kind, prefix in (("heads", "refs/heads/"), ("tags", "refs/tags/"), ("pr", "refs/pr/")):
            names = self.refs(kind)
            short = revision.removeprefix(prefix)
            if short in names and (kind != "pr" or revision.startswith(prefix)):
                return names[short]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            for file in (self.folder / "commits").glob(f"{revision}*.json"):
                return file.stem
        raise revision_not_found(revision)

    def commit(self, revision: str) -> Commit:
        """The commit of a revision."""
        document = json.loads((self.folder / "commits" / f"{self.commit_id(revision)}.json").read_bytes())
        return Commit(**document | {"files": {path: FileEntry(**entry) for path, entry in document["files"].items()}})

    def history(self, revision: str) -> Iterator[Commit]:
        """The commits of a revision, newest first."""
        commit: Commit | None = self.commit(revision)
        while commit is not None:
            yield commit
            commit = self.commit(commit.parent) if commit.parent else None

    def append(self, draft: Commit, *, kind: str, name: str) -> Commit:
        """Add a commit and let a branch (kind "heads") or pull request (kind "pr") point to it."""
        document = asdict(draft)
        commit = replace(draft, id=hashlib.sha1(json.dumps(document, sort_keys=True).encode()).hexdigest())
        self.before_step("manifest")
        write_atomically(self.folder / "commits" / f"{commit.id}.json", json.dumps(asdict(commit)).encode())
        self.before_step("branch")
        self.set_ref(kind, name, commit.id)
        self.before_step("answer")
        return commit


def find_problems(root: Path) -> list[str]:
    """Everything below a Hub's folder that contradicts itself: names without commits, files without their content."""
    problems, store = [], Store(root)
    for repo in (repo for repo_type in REPO_TYPES for repo in store.repos(repo_type)):
        if "main" not in repo.refs("heads"):
            problems.append(f"{repo.id}: no branch main")
        for name, commit_id in {**repo.refs("heads"), **repo.refs("tags"), **repo.refs("pr")}.items():
            try:
                entries = [item for commit in repo.history(commit_id) for item in commit.files.items()]
            except (HubError, ValueError, OSError, TypeError) as error:
                problems.append(f"{repo.id}: {name} points to a commit that cannot be read: {error}")
                continue
            for path, entry in entries:
                file = store.blobs.path(entry.sha256)
                if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != entry.sha256:
                    problems.append(f"{repo.id}: {path} at {name} has lost its content {entry.sha256}")
    return problems


class Store:
    """All blobs and repositories under one folder. `before_step` hears of each step of a commit before it is taken."""

    def __init__(self, root: Path, *, before_step: Callable[[str], None] = lambda _step: None) -> None:
        self.root = root
        self.before_step = before_step
        self.blobs = Blobs(root / "blobs")
        (root / "incoming").mkdir(parents=True, exist_ok=True)

    def discard_unfinished(self) -> None:
        """Remove what an earlier server was in the middle of receiving."""
        for folder in ("incoming", "parts"):
            shutil.rmtree(self.root / folder, ignore_errors=True)
        (self.root / "incoming").mkdir()

    def temporary(self) -> Path:
        """A new name on the same disk as everything else."""
        return self.root / "incoming" / secrets.token_hex(16)

    def _repo(self, repo_type: str, repo_id: str) -> Repo:
        return Repo(self.root / "repos" / repo_type / repo_id, repo_type, repo_id, self.before_step)

    def find(self, repo_type: str, repo_id: str) -> Repo | None:
        """The repository, or None when there is none."""
        repo = self._repo(repo_type, repo_id)
        valid = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id) is not None
        return repo if valid and (repo.folder / "settings.json").is_file() else None

    def repos(self, repo_type: str) -> Iterator[Repo]:
        """All repositories of a type, by id."""
        for file in sorted((self.root / "repos" / repo_type).glob("*/*/settings.json")):
            yield self._repo(repo_type, f"{file.parent.parent.name}/{file.parent.name}")

    def create(self, repo_type: str, repo_id: str, **settings: object) -> Repo:
        """A new repository with the first commit that the Hub itself makes."""
        if not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", repo_id):
            raise HubError(400, f"Invalid repo name: {repo_id}")
        draft = Repo(self.temporary(), repo_type, repo_id, lambda _step: None)
        document = {"private": False, "gated": False, "granted": [], "createdAt": now(), "sdk": None} | settings
        write_atomically(draft.folder / "settings.json", json.dumps(document).encode())
        first = {".gitattributes": self.blobs.regular_file(GITATTRIBUTES)}
        commit = Commit("", None, "initial commit", "", repo_id.split("/")[0], now(), first)
        draft.append(commit, kind="heads", name="main")
        repo = self._repo(repo_type, repo_id)
        repo.folder.parent.mkdir(parents=True, exist_ok=True)
        os.rename(draft.folder, repo.folder)
        return repo

    def delete(self, repo: Repo) -> None:
        """Remove a repository; its blobs stay."""
        trash = self.temporary()
        os.rename(repo.folder, trash)
        shutil.rmtree(trash)
