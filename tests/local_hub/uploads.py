"""Endpoints that take files: how to upload, LFS in one piece or in parts, and the commit that makes them visible."""

import base64
import codecs
import hashlib
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .cards import check_card
from .context import Hub, hub_of, writable_repo
from .errors import HubError, entry_not_found, revision_not_found
from .repos import REPO
from .store import Commit, FileEntry, Repo, now

REGULAR_LIMIT = 10 * 2**20


async def preupload(request: Request) -> Response:
    """For each file whether it goes to LFS, and the id of what is there now, so that equal files are left out."""
    hub = hub_of(request)
    repo, _ = writable_repo(request)
    files = repo.commit(request.path_params["revision"]).files
    patterns = _lfs_patterns(hub, files)
    answer = []
    for file in (await request.json())["files"]:
        path, present = file["path"], files.get(file["path"])
        by_name = any(fnmatch(PurePosixPath(path).name, pattern) for pattern in patterns)
        lfs = by_name or file["size"] > REGULAR_LIMIT or not _is_text(base64.b64decode(file.get("sample", "")))
        document = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if present is not None:
            document["oid"] = present.sha256 if present.lfs else present.oid
        answer.append(document)
    return JSONResponse({"files": answer})


def _lfs_patterns(hub: Hub, files: dict[str, FileEntry]) -> list[str]:
    if ".gitattributes" not in files:
        return []
    lines = hub.blobs.path(files[".gitattributes"].sha256).read_text().splitlines()
    return [line.split()[0] for line in lines if "filter=lfs" in line]


def _is_text(sample: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(sample, final=False)
    except UnicodeDecodeError:
        return False
    return "\0" not in text


async def lfs_batch(request: Request) -> Response:
    """Where to send LFS objects; those that are here already get no action."""
    hub, body = hub_of(request), await request.json()
    if body["operation"] != "upload":
        raise HubError(400, "only the operation upload is known")
    repo, _ = writable_repo(request)
    by_xet = hub.xet is not None and "xet" in body.get("transfers", [])
    answer: dict[str, Any] = {"transfer": "xet" if by_xet else "basic", "objects": []}
    for wanted in body["objects"]:
        document = {"oid": wanted["oid"], "size": wanted["size"]}
        if by_xet and not hub.blobs.has(wanted["oid"]):
            repo_url = f"{hub.url}/api/{repo.type}s/{repo.id}"
            document["actions"] = {"upload": {"href": f"{repo_url}/xet-write-token/main", "header": {}}}
        elif not hub.blobs.has(wanted["oid"]):
            document["actions"] = _upload_actions(hub, request, wanted["oid"], wanted["size"])
            if "header" in document["actions"]["upload"]:
                answer["transfer"] = "multipart"
        answer["objects"].append(document)
    return JSONResponse(answer, media_type="application/vnd.git-lfs+json")


def _upload_actions(hub: Hub, request: Request, oid: str, size: int) -> dict[str, Any]:
    verify = {"href": hub.url + request.scope["raw_path"].decode().removesuffix("/objects/batch") + "/verify"}
    if size <= hub.part_size:
        return {"upload": {"href": f"{hub.cdn_url}/lfs/{oid}?size={size}"}, "verify": verify}
    parts = range(1, -(-size // hub.part_size) + 1)
    urls = {f"{number:05d}": f"{hub.cdn_url}/lfs/{oid}/parts/{number}" for number in parts}
    header = {"chunk_size": str(hub.part_size)} | urls
    return {"upload": {"href": f"{hub.url}/lfs/{oid}/complete", "header": header}, "verify": verify}


async def _receive(request: Request, path: Path) -> str:
    """Write a request's body to a file; returns its md5. A connection that breaks leaves no file."""
    digest = hashlib.md5()
    try:
        with path.open("wb") as stream:
            async for block in request.stream():
                digest.update(block)
                stream.write(block)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


async def put_object(request: Request) -> Response:
    """A whole LFS object; refused unless it has the announced sha256."""
    hub, oid = hub_of(request), request.path_params["oid"]
    hub.blobs.path(oid)  # refuses what is no sha256 before anything is received
    temporary = hub.store.temporary()
    etag = await _receive(request, temporary)
    hub.blobs.adopt(temporary, oid)
    return Response(headers={"ETag": f'"{etag}"'})


def _parts_folder(request: Request) -> Path:
    hub, oid = hub_of(request), request.path_params["oid"]
    return hub.store.root / "parts" / hub.blobs.path(oid).name


async def put_part(request: Request) -> Response:
    """One part of an LFS object."""
    folder = _parts_folder(request)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = hub_of(request).store.temporary()
    etag = await _receive(request, temporary)
    temporary.replace(folder / f"{int(request.path_params['number']):05d}.{etag}")
    return Response(headers={"ETag": f'"{etag}"'})


async def complete_parts(request: Request) -> Response:
    """Join the parts; refused unless the whole has the announced sha256."""
    hub, folder, oid = hub_of(request), _parts_folder(request), request.path_params["oid"]
    temporary = hub.store.temporary()
    with temporary.open("wb") as whole:
        for part in (await request.json())["parts"]:
            file = folder / f"{part['partNumber']:05d}.{part['etag'].strip(chr(34))}"
            if not file.is_file():
                raise HubError(400, f"part {part['partNumber']} was not uploaded")
            with file.open("rb") as stream:
                shutil.copyfileobj(stream, whole)
    hub.blobs.adopt(temporary, oid)
    shutil.rmtree(folder)
    return JSONResponse({})


async def verify_object(request: Request) -> Response:
    """Whether an LFS object arrived."""
    hub, body = hub_of(request), await request.json()
    writable_repo(request)
    path = hub.blobs.path(body["oid"])
    if not path.is_file() or path.stat().st_size != body["size"]:
        raise HubError(404, "object not found or of another size")
    return JSONResponse({})


async def commit(request: Request) -> Response:
    """Apply the operations of a commit to a branch, all or none."""
    hub, revision = hub_of(request), request.path_params["revision"]
    repo, account = writable_repo(request)
    lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
    # From here to the end nothing waits: no other commit can come between.
    as_pull_request = request.query_params.get("create_pr") == "1"
    on_pull_request = revision.startswith("refs/pr/")
    if not on_pull_request and not as_pull_request and revision not in repo.refs("heads"):
        raise revision_not_found(revision)
    head = repo.commit(revision)
    header = next(line["value"] for line in lines if line["key"] == "header")
    parent = header.get("parentCommit")
    if parent is not None and not head.id.startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = _apply(hub, head, [line for line in lines if line["key"] != "header"])
    _refuse_bad_card(hub, repo, head, files)
    draft = Commit("", head.id, header["summary"], header.get("description", ""), account.name, now(), files)
    answer: dict[str, Any] = {"success": True}
    if as_pull_request:
        kind, name = "pr", str(len(repo.refs("pr")) + 1)
    else:
        kind, name = ("pr", revision.removeprefix("refs/pr/")) if on_pull_request else ("heads", revision)
    done = repo.append(draft, kind=kind, name=name)
    home = f"{hub.url}/{'' if repo.type == 'model' else repo.type + 's/'}{repo.id}"
    if as_pull_request:
        answer["pullRequestUrl"] = f"{home}/discussions/{name}"
    return JSONResponse(answer | {"commitUrl": f"{home}/commit/{done.id}", "commitOid": done.id})


def _apply(hub: Hub, head: Commit, operations: list[dict[str, Any]]) -> dict[str, FileEntry]:
    files = dict(head.files)
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        path = value["path"]
        parts = path.split("/")
        if not path or any(part in ("", ".", "..", ".git") for part in parts if kind != "deletedFolder"):
            raise HubError(400, f"not a path in a repository: {path!r}")
        if kind == "file":
            content = value["content"]
            data = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
            files[path] = hub.blobs.regular_file(data)
        elif kind == "lfsFile":
            files[path] = hub.blobs.lfs_file(value["oid"])
            if value.get("size", files[path].size) != files[path].size:
                raise HubError(400, f"LFS object of {path} has another size than announced")
        elif kind == "deletedFile":
            if files.pop(path, None) is None:
                raise entry_not_found(path, commit=head.id)
        elif kind == "deletedFolder":
            inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
            if not inside:
                raise entry_not_found(path, commit=head.id)
            for name in inside:
                del files[name]
        else:
            raise HubError(400, f"unknown operation {kind!r}")
    return dict(sorted(files.items()))


def _refuse_bad_card(hub: Hub, repo: Repo, head: Commit, files: dict[str, FileEntry]) -> None:
    readme = files.get("README.md")
    if readme is None or readme == head.files.get("README.md"):
        return
    errors, _ = check_card(hub.blobs.path(readme.sha256).read_text(errors="replace"), repo.type)
    if errors:
        raise HubError(400, f"Invalid metadata in README.md. {' '.join(errors)}")


LFS = "/{owner}/{name}/info/lfs"
ROUTES = [
    Route(REPO + "/preupload/{revision:segment}", preupload, methods=["POST"]),
    Route(REPO + "/commit/{revision:segment}", commit, methods=["POST"]),
    Route(LFS + "/objects/batch", lfs_batch, methods=["POST"]),
    Route("/{kind:kind}" + LFS + "/objects/batch", lfs_batch, methods=["POST"]),
    Route(LFS + "/verify", verify_object, methods=["POST"]),
    Route("/{kind:kind}" + LFS + "/verify", verify_object, methods=["POST"]),
    Route("/lfs/{oid}", put_object, methods=["PUT"]),
    Route("/lfs/{oid}/parts/{number:int}", put_part, methods=["PUT"]),
    Route("/lfs/{oid}/complete", complete_parts, methods=["POST"]),
]
