"""The Hub of the tests against clients that know nothing of it: huggingface_hub, the hf command, the JavaScript client.

Each client is a process of its own. Several tests fix what huggingface_hub does when something goes wrong, because
polypseg's own checks are built on it.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

import processes
from local_hub.process import HubProcess, running_hub
from local_hub.xet import chunk_offsets

CARD = "---\nlicense: apache-2.0\ntags: [polyp]\n---\n# A model\n"
MEBIBYTE = 2**20

PREAMBLE = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()

def outcome(action):
    try:
        return action() and "done" or "done"
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return f"{type(error).__name__} {status}" if status else type(error).__name__

arguments = sys.argv[1:]
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubProcess]:
    with running_hub(tmp_path / "hub", start=processes.start) as process:
        yield process


@pytest.fixture
def xet_hub(tmp_path: Path) -> Iterator[HubProcess]:
    with running_hub(tmp_path / "hub", xet=True, start=processes.start) as process:
        yield process


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder like that of a model: small texts, a picture and a file of 12 MiB."""
    folder = tmp_path / "model"
    (folder / "results").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "results" / "kvasir ü#1.json").write_text('{"dice": null}')
    (folder / "empty.txt").touch()
    (folder / "model.safetensors").write_bytes(random.Random(1).randbytes(12 * MEBIBYTE))
    return folder


def digests(folder: Path) -> dict[str, str]:
    """sha256 of each file, by its path; what the Hub and the client add themselves is left out."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in files.items()
        if name != ".gitattributes" and not name.startswith(".cache/")
    }


def start_client(hub: HubProcess, home: Path, *programs: str, arguments: Sequence[object] = ()) -> processes.Process:
    """A Python process that runs the programs one after another, with `api`, `outcome` and `arguments`."""
    program = "\n".join([PREAMBLE, *map(textwrap.dedent, programs)])
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return processes.start(command, env=hub.environment(home), stdout=PIPE, stderr=PIPE)


def run_client(hub: HubProcess, home: Path, *programs: str, arguments: Sequence[object] = ()) -> Any:
    """What the programs left in `result`."""
    process = start_client(hub, home, *programs, "print(json.dumps(result))", arguments=arguments)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


UPLOAD = """
api.create_repo("polypseg/model", exist_ok=True)
result = api.upload_folder(repo_id="polypseg/model", folder_path=arguments[0]).oid
"""
DOWNLOAD = 'result = snapshot_download("polypseg/model")'
FILES = 'result = api.list_repo_files("polypseg/model")'
FILES_THEN_BOTH = f"{FILES}\nbefore = result\n{UPLOAD}\n{DOWNLOAD}\nresult = [before, result]"


def call(hub: HubProcess, method: str, path: str, body: bytes, *, token: str | None = None) -> int:
    """The status of one request."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(hub.url + path, body, headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def create_repo(hub: HubProcess) -> None:
    """The empty repository polypseg/model."""
    body = json.dumps({"name": "model", "organization": "polypseg"}).encode()
    assert call(hub, "POST", "/api/repos/create", body, token="hf_write") == 200


def test_snapshot_equals_the_uploaded_folder_and_the_token_stays_with_the_hub(
    hub: HubProcess, model: Path, tmp_path: Path
) -> None:
    folder = run_client(hub, tmp_path / "home", UPLOAD, DOWNLOAD, arguments=[model])
    assert digests(Path(folder)) == digests(model)
    assert not hub.requests("hf_write")  # in no address
    elsewhere = [request for request in hub.requests() if request["host"].startswith("localhost")]
    assert len(elsewhere) == 4  # 12 MiB up in three parts of 5 MiB, down in one
    assert not any(request["authorized"] for request in elsewhere)


def test_second_upload_makes_no_commit(hub: HubProcess, model: Path, tmp_path: Path) -> None:
    change = """
    first = result
    result = api.upload_folder(repo_id="polypseg/model", folder_path=arguments[0]).oid
    unchanged = result == first
    (Path(arguments[0]) / "config.json").write_text('{"changed": true}')
    result = api.upload_folder(repo_id="polypseg/model", folder_path=arguments[0]).oid
    result = [unchanged, result == first]
    """
    assert run_client(hub, tmp_path / "home", UPLOAD, change, arguments=[model]) == [True, False]
    assert len(hub.requests("/commit/")) == 2  # of three uploads
    assert len(hub.requests("PUT ")) == 3  # the parts of the first


def test_refusals_are_the_clients_own_exceptions(hub: HubProcess, model: Path, tmp_path: Path) -> None:
    program = """
    def upload(repo_id, **options):
        return api.upload_file(repo_id=repo_id, path_or_fileobj=b"x", path_in_repo="x.txt", **options)
    card = "---\\nlicense: no-such-license\\n---\\n".encode()
    head = api.model_info("polypseg/model").sha
    result = {
        "who, wrong token": outcome(lambda: HfApi(token="hf_wrong").whoami()),
        "info, wrong token": outcome(lambda: api.model_info("polypseg/model", token="hf_wrong")),
        "upload, read token": outcome(lambda: upload("polypseg/model", token="hf_read")),
        "upload, no member": outcome(lambda: upload("polypseg/model", token="hf_other")),
        "create, no member": outcome(lambda: api.create_repo("polypseg/new", token="hf_other")),
        "upload, no repository": outcome(lambda: upload("polypseg/none")),
        "info, no repository": outcome(lambda: api.model_info("polypseg/none")),
        "info, no owner": outcome(lambda: api.model_info("none")),
        "info, no repository, nobody": outcome(lambda: api.model_info("polypseg/none", token=False)),
        "info, other type": outcome(lambda: api.dataset_info("polypseg/model")),
        "snapshot, no revision": outcome(lambda: snapshot_download("polypseg/model", revision="v9")),
        "file, no file": outcome(lambda: hf_hub_download("polypseg/model", "none.bin")),
        "upload, late": outcome(lambda: upload("polypseg/model", parent_commit="0" * 40)),
        "upload, in time": outcome(lambda: upload("polypseg/model", parent_commit=head)),
        "delete, no file": outcome(lambda: api.delete_file("none.bin", "polypseg/model")),
        "card": outcome(lambda: api.upload_file(
            repo_id="polypseg/model", path_or_fileobj=card, path_in_repo="README.md")),
        "create again": outcome(lambda: api.create_repo("polypseg/model")),
        "delete, missing": outcome(lambda: api.delete_repo("polypseg/none")),
    }
    """
    assert run_client(hub, tmp_path / "client", UPLOAD, program, arguments=[model]) == {
        "who, wrong token": "HfHubHTTPError 401",
        "info, wrong token": "HfHubHTTPError 401",
        "upload, read token": "HfHubHTTPError 403",
        "upload, no member": "HfHubHTTPError 403",
        "create, no member": "HfHubHTTPError 403",
        "upload, no repository": "RepositoryNotFoundError 404",
        "info, no repository": "RepositoryNotFoundError 404",
        "info, no owner": "RepositoryNotFoundError 404",
        "info, no repository, nobody": "RepositoryNotFoundError 401",
        "info, other type": "RepositoryNotFoundError 404",
        "snapshot, no revision": "RevisionNotFoundError 404",
        "file, no file": "RemoteEntryNotFoundError 404",
        "upload, late": "HfHubHTTPError 412",
        "upload, in time": "done",
        "delete, no file": "RemoteEntryNotFoundError 404",
        "card": "ValueError",
        "create again": "HfHubHTTPError 409",
        "delete, missing": "RepositoryNotFoundError 404",
    }
    assert hub.problems() == []


def test_private_and_gated_repositories_admit_only_whom_they_should(
    hub: HubProcess, model: Path, tmp_path: Path
) -> None:
    program = """
    def attempts(action):
        tokens = {"owner": "hf_read", "other": "hf_other", "nobody": False}
        return {who: outcome(lambda: action(token)) for who, token in tokens.items()}
    def info(token):
        return api.model_info("polypseg/model", token=token)
    def file(token):
        return hf_hub_download("polypseg/model", "config.json", token=token, cache_dir=arguments[1] + str(token))
    api.update_repo_settings("polypseg/model", private=True)
    result = {"private, info": attempts(info), "private, file": attempts(file)}
    result["listed"] = [len(list(api.list_models(author="polypseg", token=t))) for t in ("hf_read", "hf_other", False)]
    api.update_repo_settings("polypseg/model", private=False, gated="auto")
    arguments[1] += "-gated"
    result |= {"gated, info": attempts(info), "gated, file": attempts(file)}
    api.grant_access("polypseg/model", "bob")
    result["granted, file"] = attempts(file)
    """
    hidden = {"owner": "done", "other": "RepositoryNotFoundError 404", "nobody": "RepositoryNotFoundError 401"}
    assert run_client(hub, tmp_path / "client", UPLOAD, program, arguments=[model, tmp_path / "cache"]) == {
        "private, info": hidden,
        "private, file": hidden,
        "listed": [1, 0, 0],
        "gated, info": {"owner": "done", "other": "done", "nobody": "done"},
        "gated, file": {"owner": "done", "other": "GatedRepoError 403", "nobody": "GatedRepoError 401"},
        "granted, file": {"owner": "done", "other": "done", "nobody": "GatedRepoError 401"},
    }


def test_cut_download_resumes_where_it_was_cut(hub: HubProcess, model: Path, tmp_path: Path) -> None:
    hub.control("GET /cdn/", "cut_response", after=11 * MEBIBYTE)
    folder = run_client(hub, tmp_path / "home", UPLOAD, DOWNLOAD, arguments=[model])
    assert digests(Path(folder)) == digests(model)
    # The client writes 10 MiB at a time, and asks for the rest.
    first, second = hub.requests("GET /cdn/")
    assert (first["status"], first["range"], first["sent"]) == (200, None, 11 * MEBIBYTE)
    assert (second["status"], second["range"], second["sent"]) == (206, f"bytes={10 * MEBIBYTE}-", 2 * MEBIBYTE)


@pytest.mark.slow
def test_broken_uploads_are_repeated(hub: HubProcess, model: Path, tmp_path: Path) -> None:
    hub.control("PUT /lfs/.*/parts/1", "status", times=1)
    hub.control("PUT /lfs/.*/parts/2", "cut_request", after=MEBIBYTE)
    folder = run_client(hub, tmp_path / "home", UPLOAD, DOWNLOAD, arguments=[model])
    assert [request["status"] for request in hub.requests("PUT /lfs/.*/parts/1")] == [503, 200]
    assert [request["status"] for request in hub.requests("PUT /lfs/.*/parts/2")] == [None, 200]
    assert digests(Path(folder)) == digests(model)


def test_flipped_byte_is_seen_only_by_a_check(hub: HubProcess, model: Path, tmp_path: Path) -> None:
    """Why polypseg checks what it downloads: the client does not."""
    hub.control("GET /cdn/", "flip", after=5 * MEBIBYTE)
    program = """
    snapshot_download("polypseg/model")
    found = [item["path"] for item in api.verify_repo_checksums("polypseg/model").mismatches]
    snapshot_download("polypseg/model", force_download=True)
    result = [found, len(api.verify_repo_checksums("polypseg/model").mismatches)]
    """
    found, left_after_force = run_client(hub, tmp_path / "home", UPLOAD, program, arguments=[model])
    assert (found, left_after_force) == (["model.safetensors"], 0)


def test_client_killed_in_an_upload_changes_nothing(hub: HubProcess, model: Path, tmp_path: Path) -> None:
    hub.control("PUT /lfs/.*/parts/2", "delay", seconds=60)
    client = start_client(hub, tmp_path / "home", UPLOAD, arguments=[model])
    hub.wait_for("PUT /lfs/.*/parts/2")
    client.kill()
    client.communicate()
    assert hub.problems() == []
    before, folder = run_client(hub, tmp_path / "home", FILES_THEN_BOTH, arguments=[model])
    assert before == [".gitattributes"]
    assert digests(Path(folder)) == digests(model)


@pytest.mark.parametrize(("step", "visible"), [("manifest", False), ("branch", False), ("answer", True)])
def test_server_killed_in_a_commit_keeps_a_valid_repository(
    hub: HubProcess, model: Path, tmp_path: Path, step: str, visible: bool
) -> None:
    (model / "model.safetensors").write_bytes(bytes(1000))
    hub.control(step, "crash")
    client = start_client(hub, tmp_path / "home", UPLOAD, arguments=[model])
    client.communicate(timeout=60)
    assert client.returncode != 0
    assert hub.process.wait(timeout=10) == -signal.SIGKILL
    assert hub.problems() == []
    hub.restart()
    before, folder = run_client(hub, tmp_path / "home", FILES_THEN_BOTH, arguments=[model])
    assert ("config.json" in before) == visible
    assert len(hub.requests("/commit/")) == (0 if visible else 1)
    assert digests(Path(folder)) == digests(model)
    assert hub.problems() == []


def test_commits_of_two_clients_both_count(hub: HubProcess, tmp_path: Path) -> None:
    create_repo(hub)
    program = """
    for number in range(5):
        api.upload_file(repo_id="polypseg/model", path_or_fileobj=b"x", path_in_repo=f"{arguments[0]}/{number}.txt")
    """
    clients = [start_client(hub, tmp_path / name, program, arguments=[name]) for name in ("a", "b")]
    assert [client.communicate()[1] for client in clients] == ["", ""]
    assert len(run_client(hub, tmp_path / "reader", FILES)) == 1 + 5 + 5


def test_tags_and_branches_keep_their_commit(hub: HubProcess, tmp_path: Path) -> None:
    program = """
    rid = "polypseg/model"
    api.create_repo(rid)
    def put(text, **options):
        return api.upload_file(repo_id=rid, path_or_fileobj=text.encode(), path_in_repo="a.txt", **options).oid
    def read(revision):
        return Path(hf_hub_download(rid, "a.txt", revision=revision)).read_text()
    first = put("one")
    api.create_tag(rid, tag="v1.0", tag_message="first")
    api.create_branch(rid, branch="dev/x", revision=first)
    second = put("two")
    put("three", revision="dev/x")
    pull_request = put("four", create_pr=True)
    refs = api.list_repo_refs(rid, include_pull_requests=True)
    result = {
        "texts": [read(name) for name in ("main", "v1.0", "dev/x", "refs/pr/1", first[:8])],
        "tags": {ref.name: ref.target_commit == first for ref in refs.tags},
        "branches": sorted(ref.name for ref in refs.branches),
        "pull requests": [ref.ref for ref in refs.pull_requests],
        "titles": [commit.title for commit in api.list_repo_commits(rid)],
        "tag again": outcome(lambda: api.create_tag(rid, tag="v1.0")),
        "tag again, allowed": outcome(lambda: api.create_tag(rid, tag="v1.0", exist_ok=True)),
    }
    api.delete_tag(rid, tag="v1.0")
    api.delete_branch(rid, branch="dev/x")
    refs = api.list_repo_refs(rid)
    result["left"] = [ref.name for ref in [*refs.tags, *refs.branches]]
    """
    assert run_client(hub, tmp_path / "client", program) == {
        "texts": ["two", "one", "three", "four", "one"],
        "tags": {"v1.0": True},
        "branches": ["dev/x", "main"],
        "pull requests": ["refs/pr/1"],
        "titles": ["Upload a.txt with huggingface_hub", "Upload a.txt with huggingface_hub", "initial commit"],
        "tag again": "HfHubHTTPError 409",
        "tag again, allowed": "done",
        "left": ["main"],
    }


def test_collections_keep_order_notes_and_privacy(hub: HubProcess, tmp_path: Path) -> None:
    program = """
    for name in "abcde":
        api.create_repo(f"polypseg/{name}")
    api.create_repo("polypseg/data", repo_type="dataset")
    made = api.create_collection("Polyps: 2026", namespace="polypseg", description="all", exists_ok=True)
    slug = api.create_collection("Polyps: 2026", namespace="polypseg", exists_ok=True).slug
    for name in "abcde":
        api.add_collection_item(slug, f"polypseg/{name}", "model", note=f"note {name}")
    api.add_collection_item(slug, "polypseg/data", "dataset")
    items = api.get_collection(slug).items
    api.update_collection_item(slug, items[4].item_object_id, position=0, note="first")
    api.delete_collection_item(slug, items[1].item_object_id)
    renamed = api.update_collection_metadata(slug, title="Polyps", private=True)
    final = api.get_collection(slug)
    result = {
        "same": slug == made.slug,
        "items": [[item.item_type, item.item_id, item.note] for item in final.items],
        "again": outcome(lambda: api.add_collection_item(slug, "polypseg/a", "model")),
        "again, allowed": outcome(lambda: api.add_collection_item(slug, "polypseg/a", "model", exists_ok=True)),
        "missing": outcome(lambda: api.add_collection_item(slug, "polypseg/none", "model")),
        "read token": outcome(lambda: api.add_collection_item(slug, "polypseg/b", "model", token="hf_read")),
        "listed": [len(c.items) for c in api.list_collections(owner="polypseg", item="models/polypseg/a")],
        "listed to others": [c.slug for c in api.list_collections(owner="polypseg", token="hf_other")],
        "others": outcome(lambda: api.get_collection(slug, token="hf_other")),
        "title": [renamed.title, renamed.slug.rsplit("-", 1)[0], final.description],
    }
    api.delete_collection(slug)
    result["left"] = len(list(api.list_collections(owner="polypseg")))
    """
    assert run_client(hub, tmp_path / "client", program) == {
        "same": True,
        "items": [
            ["model", "polypseg/e", "first"],
            ["model", "polypseg/a", "note a"],
            ["model", "polypseg/c", "note c"],
            ["model", "polypseg/d", "note d"],
            ["dataset", "polypseg/data", None],
        ],
        "again": "HfHubHTTPError 409",
        "again, allowed": "done",
        "missing": "RepositoryNotFoundError 404",
        "read token": "HfHubHTTPError 403",
        "listed": [4],
        "listed to others": [],
        "others": "HfHubHTTPError 404",
        "title": ["Polyps", "polypseg/polyps", "all"],
        "left": 0,
    }


def test_lists_and_trees_come_complete_in_pages(hub: HubProcess, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    for number in range(250):
        (folder / f"part {number % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"part {number % 3}" / f"{number}.txt").write_text(str(number))
    program = """
    for repo_type, options in (("model", {}), ("dataset", {}), ("space", {"space_sdk": "gradio"})):
        api.create_repo("alice/many", repo_type=repo_type, **options)
        api.upload_folder(repo_id="alice/many", repo_type=repo_type, folder_path=arguments[0])
    tree = api.list_repo_tree("alice/many", recursive=True)
    result = {
        "tree": sorted(type(entry).__name__ for entry in tree),
        "folder": len(list(api.list_repo_tree("alice/many", "part 1", repo_type="dataset"))),
        "top": [entry.path for entry in api.list_repo_tree("alice/many", repo_type="space", expand=True)],
        "some": [e.path for e in api.get_paths_info("alice/many", ["part 0", "part 1/1.txt", "none"])],
        "spaces": [space.sdk for space in api.list_spaces(author="alice")],
        "found": [m.id for m in api.list_models(search="MAN")] + [m.id for m in api.list_models(search="x")],
    }
    """
    assert run_client(hub, tmp_path / "client", program, arguments=[folder]) == {
        "tree": ["RepoFile"] * 251 + ["RepoFolder"] * 3,
        "folder": 83,
        "top": [".gitattributes", "part 0", "part 1", "part 2"],
        "some": ["part 0", "part 1/1.txt"],
        "spaces": ["gradio"],
        "found": ["alice/many"],
    }
    assert len(hub.requests("GET /api/models/alice/many/tree/")) == 3


def test_server_trusts_no_announced_content(hub: HubProcess, tmp_path: Path) -> None:
    create_repo(hub)
    right, sha256 = b"right", hashlib.sha256(b"right").hexdigest()

    def commit_one(key: str, value: Mapping[str, object]) -> int:
        lines = [{"key": "header", "value": {"summary": "x"}}, {"key": key, "value": value}]
        body = "\n".join(map(json.dumps, lines)).encode()
        return call(hub, "POST", "/api/models/polypseg/model/commit/main", body, token="hf_write")

    def commit(path: str, oid: str) -> int:
        return commit_one("lfsFile", {"path": path, "algo": "sha256", "oid": oid, "size": 5})

    assert call(hub, "PUT", f"/lfs/{sha256}", b"wrong") == 422
    assert commit("a.bin", sha256) == 400
    assert call(hub, "PUT", f"/lfs/{sha256}", right) == 200
    assert commit("../a.bin", sha256) == commit("a/../../b.bin", sha256) == commit(".git/config", sha256) == 400
    assert commit("a.bin", "../../hub/settings") == 400
    assert commit("a.bin", sha256) == 200
    assert call(hub, "PUT", "/lfs/..%2F..%2Fx", right) == 400
    card = {"path": "README.md", "content": "---\nlicense: none-such\n---\n"}
    assert commit_one("file", card) == 400
    assert run_client(hub, tmp_path / "reader", FILES) == [".gitattributes", "a.bin"]


def packing(xorb: Path) -> set[int]:
    """How the chunks of a xorb are packed: 0 stored, 1 LZ4, 2 LZ4 after grouping."""
    data = xorb.read_bytes()
    return {data[start + 4] for start in chunk_offsets(data)[:-1]}


@pytest.mark.slow
def test_xet_round_trip_returns_equal_files(xet_hub: HubProcess, model: Path, tmp_path: Path) -> None:
    """Plain, LZ4 and byte-grouped chunks: noise, text and numbers."""
    (model / "text.bin").write_bytes(b"colon " * MEBIBYTE)
    chance = random.Random(2)
    numbers = array("f", (chance.gauss(0, 0.02) for _ in range(300_000)))
    (model / "numbers.safetensors").write_bytes(numbers.tobytes())
    folder = run_client(xet_hub, tmp_path / "home", UPLOAD, DOWNLOAD, arguments=[model])
    assert digests(Path(folder)) == digests(model)
    assert xet_hub.requests("POST /xet/v1/xorbs/") and not xet_hub.requests("PUT ")
    assert {scheme for file in (xet_hub.root / "xet" / "xorbs").iterdir() for scheme in packing(file)} == {0, 1, 2}
    assert xet_hub.problems() == []
    assert xet_hub.requests("GET /xet/content/") and not xet_hub.requests("GET /cdn/")
    assert not any(request["authorized"] for request in xet_hub.requests("GET /xet/content/"))
    xet_hub.control("GET /xet/v2/reconstructions/", "status", times=-1, status=404)
    folder = run_client(xet_hub, tmp_path / "old", DOWNLOAD)  # the client falls back to version 1 of the protocol
    assert digests(Path(folder)) == digests(model)
    assert {request["status"] for request in xet_hub.requests("GET /xet/v1/reconstructions/")} == {200}
    xet_hub.clear()
    xet_hub.xet = False  # a client without Xet gets the same files from the same server
    folder = run_client(xet_hub, tmp_path / "plain", DOWNLOAD)
    assert digests(Path(folder)) == digests(model)
    assert len(xet_hub.requests("GET /cdn/")) == 3


def test_xet_sends_only_new_chunks_and_no_second_commit(xet_hub: HubProcess, model: Path, tmp_path: Path) -> None:
    change = """
    first = result
    assert api.upload_folder(repo_id="polypseg/model", folder_path=arguments[0]).oid == first
    with open(arguments[0] + "/model.safetensors", "r+b") as stream:
        stream.seek(6 * 2**20)
        stream.write(b"changed")
    """
    folder = run_client(xet_hub, tmp_path / "home", UPLOAD, change, UPLOAD, DOWNLOAD, arguments=[model])
    assert digests(Path(folder)) == digests(model)
    assert len(xet_hub.requests("/commit/")) == 2
    whole, *changed = [request["received"] for request in xet_hub.requests("POST /xet/v1/xorbs/")]
    assert whole > 12 * MEBIBYTE and 0 < sum(changed) < MEBIBYTE


def test_client_killed_in_a_xet_upload_changes_nothing(xet_hub: HubProcess, model: Path, tmp_path: Path) -> None:
    xet_hub.control("POST /xet/v1/shards", "delay", seconds=60)
    client = start_client(xet_hub, tmp_path / "home", UPLOAD, arguments=[model])
    xet_hub.wait_for("POST /xet/v1/shards")
    client.kill()
    client.communicate()
    before, folder = run_client(xet_hub, tmp_path / "home", FILES_THEN_BOTH, arguments=[model])
    assert before == [".gitattributes"]
    assert xet_hub.problems() == []
    assert digests(Path(folder)) == digests(model)


def test_flipped_byte_of_a_xorb_is_seen_only_by_a_check(xet_hub: HubProcess, model: Path, tmp_path: Path) -> None:
    xet_hub.control("GET /xet/content/", "flip", after=4096)
    program = """
    snapshot_download("polypseg/model")
    result = [item["path"] for item in api.verify_repo_checksums("polypseg/model").mismatches]
    """
    assert run_client(xet_hub, tmp_path / "home", UPLOAD, program, arguments=[model]) == ["model.safetensors"]


@pytest.mark.slow
def test_hf_command_uploads_and_downloads(hub: HubProcess, model: Path, tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("hf")
    if not command.is_file():
        pytest.skip("the hf command is not next to this Python")

    def hf(*arguments: object) -> str:
        return subprocess.run(
            [str(command), *map(str, arguments)],
            env=hub.environment(tmp_path / "home"),
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    assert "alice" in hf("auth", "whoami")
    hf("upload", "polypseg/model", model, ".")
    hf("download", "polypseg/model", "--local-dir", tmp_path / "received")
    assert digests(tmp_path / "received") == digests(model)


JAVASCRIPT = """
import { createRepo, uploadFiles, downloadFile, listFiles } from "@huggingface/hub";
import { readFileSync, writeFileSync } from "node:fs";
const [, , hubUrl, source, target, transfer] = process.argv;
const common = { hubUrl, accessToken: "hf_write", repo: { type: "model", name: "polypseg/model" } };
await createRepo(common);
const content = new Blob([readFileSync(source)]);
await uploadFiles({ ...common, useXet: transfer === "xet", files: [
  { path: "model.safetensors", content }, { path: "README.md", content: new Blob(["# A model"]) } ] });
const paths = [];
for await (const file of listFiles({ ...common, recursive: true })) paths.push(file.path);
const answer = await downloadFile({ ...common, path: "model.safetensors", xet: transfer === "xet" });
writeFileSync(target, Buffer.from(await answer.arrayBuffer()));
const [from, to] = [7_000_001, 7_000_101];
const part = Buffer.from(await answer.slice(from, to).arrayBuffer());
const same = part.equals(readFileSync(source).subarray(from, to));
console.log(JSON.stringify({ paths, same }));
"""


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs a client built on npm's @huggingface/hub; skips where that cannot be installed."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("javascript")
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "client.js").write_text(JAVASCRIPT)
    install = [npm, "install", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=10000"]
    try:
        subprocess.run([*install, "@huggingface/hub"], cwd=folder, check=True, capture_output=True, timeout=60)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("npm cannot install @huggingface/hub")
    return [node, str(folder / "client.js")]


@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["lfs", "xet"])
def test_javascript_client_uploads_and_downloads(
    javascript: list[str], model: Path, tmp_path: Path, transfer: str
) -> None:
    """Another implementation of both protocols; what it uploads, the Python client reads."""
    source, received = model / "model.safetensors", tmp_path / "received"
    with running_hub(tmp_path / "hub", xet=transfer == "xet", start=processes.start) as hub:
        run = subprocess.run(
            [*javascript, hub.url, str(source), str(received), transfer],
            env={**os.environ, "NO_PROXY": "127.0.0.1,localhost"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 0, run.stderr
        expected_paths = [".gitattributes", "README.md", "model.safetensors"]
        assert json.loads(run.stdout) == {"paths": expected_paths, "same": True}
        assert received.read_bytes() == source.read_bytes()
        assert bool(hub.requests("POST /xet/v1/shards")) == bool(hub.requests("GET /xet/content/")) == hub.xet
        assert hub.problems() == []
        folder = run_client(hub, tmp_path / "home", DOWNLOAD)
        assert (Path(folder) / "model.safetensors").read_bytes() == source.read_bytes()


@pytest.mark.slow
def test_mirror_serves_the_same_files(hub: HubProcess, model: Path, tmp_path: Path) -> None:
    """olah, a mirror of the Hub by other people: from our server and, the second time, from its own store."""
    olah = shutil.which("olah-cli")
    if olah is None:
        pytest.skip("olah-cli is not on PATH; it wants an environment of its own")
    (model / "results" / "kvasir ü#1.json").unlink()  # olah asks for it only up to the "#"
    run_client(hub, tmp_path / "sender", UPLOAD, arguments=[model])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    upstream = hub.url.removeprefix("http://")
    options = {
        "host": "127.0.0.1",
        "port": address.rsplit(":", 1)[1],
        "hf-scheme": "http",
        "hf-netloc": upstream,
        "hf-lfs-netloc": upstream.replace("127.0.0.1", "localhost"),
        "mirror-scheme": "http",
        "mirror-netloc": address,
        "mirror-lfs-netloc": address,
        "repos-path": str(tmp_path / "mirror"),
        "log-path": str(tmp_path / "logs"),
    }
    command = [olah, *(word for name, value in options.items() for word in (f"--{name}", value))]
    mirror = Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    try:
        wait_for_port(address)
        through_mirror = HubProcess(hub.root, False, f"http://{address}", mirror)
        for home in ("first", "second"):
            folder = run_client(through_mirror, tmp_path / home, DOWNLOAD)
            assert digests(Path(folder)) == digests(model)
        assert len(hub.requests("GET /cdn/")) == 1
    finally:
        mirror.kill()
        mirror.wait()


def wait_for_port(address: str, *, seconds: float = 20.0) -> None:
    """Return once something listens at host:port; TimeoutError after a while."""
    host, port = address.split(":")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
            return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens at {address}")
