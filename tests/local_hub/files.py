"""Endpoints that list and deliver files."""

from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from .context import Hub, hub_of, paged, readable_repo
from .errors import HubError, entry_not_found
from .repos import REPO
from .store import Commit, FileEntry, Repo, lfs_pointer

XET_FILE_INFO = "application/vnd.xet-fileinfo+json"


def describe_file(hub: Hub, path: str, entry: FileEntry) -> dict[str, Any]:
    """A file as lists of files have it."""
    document: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.lfs:
        pointer_size = len(lfs_pointer(entry.sha256, entry.size))
        document["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": pointer_size}
        if hub.xet and (xet_hash := hub.xet.file_hash(entry.sha256)):
            document["xetHash"] = xet_hash
    return document


def _directories(commit: Commit) -> list[str]:
    found = {path[:end] for path in commit.files for end in range(len(path)) if path[end] == "/"}
    return sorted(found)


def _last_commit(repo: Repo, commit: Commit, path: str) -> dict[str, str]:
    """The newest commit in which what is at `path` became what it is."""

    def content(commit: Commit) -> dict[str, FileEntry]:
        return {name: e for name, e in commit.files.items() if name == path or name.startswith(f"{path}/")}

    newest, wanted = commit, content(commit)
    for older in repo.history(commit.id):
        if content(older) != wanted:
            break
        newest = older
    return {"id": newest.id, "title": newest.title, "date": newest.date}


async def list_tree(request: Request) -> Response:
    """The files and folders below a folder, with or without those in its folders."""
    hub, repo = hub_of(request), readable_repo(request)
    commit = repo.commit(request.path_params["revision"])
    folder = request.path_params.get("path", "").strip("/")
    directories = _directories(commit)
    if folder and folder not in directories:
        raise entry_not_found(folder, commit=commit.id)
    prefix = f"{folder}/" if folder else ""
    recursive = request.query_params.get("recursive", "").lower() in ("1", "true")
    expand = request.query_params.get("expand", "").lower() in ("1", "true")
    paths = [path for path in sorted([*directories, *commit.files]) if path.startswith(prefix)]
    paths = [path for path in paths if recursive or "/" not in path.removeprefix(prefix)]
    return paged(request, paths, lambda path: _describe(hub, repo, commit, path, with_last_commit=expand))


def _describe(hub: Hub, repo: Repo, commit: Commit, path: str, *, with_last_commit: bool) -> dict[str, Any]:
    if path in commit.files:
        document = describe_file(hub, path, commit.files[path])
    else:
        document = {"type": "directory", "oid": commit.id, "size": 0, "path": path}
    return document | ({"lastCommit": _last_commit(repo, commit, path)} if with_last_commit else {})


async def paths_info(request: Request) -> Response:
    """The given files and folders, without those that are not there."""
    hub, repo = hub_of(request), readable_repo(request)
    commit = repo.commit(request.path_params["revision"])
    if request.headers.get("content-type", "").startswith("application/json"):
        body = await request.json()
        paths, expand = body["paths"], bool(body.get("expand"))
    else:
        form = await request.form()
        paths, expand = form.getlist("paths"), str(form.get("expand", "")).lower() in ("1", "true")
    known = {*commit.files, *_directories(commit)}
    found = [path for path in paths if path in known]
    return JSONResponse([_describe(hub, repo, commit, path, with_last_commit=expand) for path in found])


async def list_commits(request: Request) -> Response:
    """The commits of a revision, newest first."""
    commits = list(readable_repo(request).history(request.path_params["revision"]))
    return paged(
        request,
        commits,
        lambda commit: {
            "id": commit.id,
            "title": commit.title,
            "message": commit.message,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        },
    )


async def resolve(request: Request) -> Response:
    """A file: small ones at once, LFS files by a redirect to the CDN."""
    hub, repo = hub_of(request), readable_repo(request)
    commit = repo.commit(request.path_params["revision"])
    hub.accounts.require_file_access(request, repo)
    path = request.path_params["path"]
    if path not in commit.files:
        raise entry_not_found(path, commit=commit.id)
    entry = commit.files[path]
    headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    if not entry.lfs:
        headers["ETag"] = f'"{entry.oid}"'
        return FileResponse(hub.blobs.path(entry.sha256), headers=headers, media_type="application/octet-stream")
    headers |= {"X-Linked-Size": str(entry.size), "X-Linked-Etag": f'"{entry.sha256}"'}
    if hub.xet and (xet_hash := hub.xet.file_hash(entry.sha256)):
        token_url = f"{hub.url}/api/{repo.type}s/{repo.id}/xet-read-token/{commit.id}"
        plan_url = f"{hub.url}/xet/v1/reconstructions/{xet_hash}"
        links = f'<{token_url}>; rel="xet-auth", <{plan_url}>; rel="xet-reconstruction-info"'
        headers |= {"X-Xet-Hash": xet_hash, "Link": links}
        if XET_FILE_INFO in request.headers.get("accept", ""):
            return JSONResponse({"hash": xet_hash}, headers=headers, media_type=XET_FILE_INFO)
    return RedirectResponse(f"{hub.cdn_url}/cdn/{entry.sha256}", 302, headers)


async def deliver(request: Request) -> Response:
    """The CDN: content to whoever knows its sha256, as a signed address would."""
    sha256 = request.path_params["sha256"]
    path = hub_of(request).blobs.path(sha256)
    if not path.is_file():
        raise HubError(404, "no such object")
    return FileResponse(path, headers={"ETag": f'"{sha256}"'}, media_type="application/octet-stream")


ROUTES = [
    Route(REPO + "/tree/{revision:segment}", list_tree),
    Route(REPO + "/tree/{revision:segment}/{path:path}", list_tree),
    Route(REPO + "/paths-info/{revision:segment}", paths_info, methods=["POST"]),
    Route(REPO + "/commits/{revision:segment}", list_commits),
    Route("/{kind:kind}/{owner}/{name}/resolve/{revision:segment}/{path:path}", resolve),
    Route("/{owner}/{name}/resolve/{revision:segment}/{path:path}", resolve),
    Route("/cdn/{sha256}", deliver),
]
