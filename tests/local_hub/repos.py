"""Endpoints about repositories: who am I, create, settings, information, lists, names of revisions, access."""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .cards import check_card, split_card
from .context import hub_of, paged, readable_repo, writable_repo
from .errors import HubError, repo_not_found
from .store import REPO_TYPES, Commit, Repo, lfs_pointer


async def whoami(request: Request) -> Response:
    """The account behind the token."""
    accounts = hub_of(request).accounts
    account = accounts.of(request)
    if account is None:
        raise HubError(401, "Invalid username or password.")
    organizations = [name for name, members in accounts.organizations.items() if account.name in members]
    return JSONResponse(
        {
            "type": "user",
            "id": account.name,
            "name": account.name,
            "fullname": account.name.title(),
            "orgs": [{"type": "org", "id": name, "name": name, "roleInOrg": "admin"} for name in organizations],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}},
        }
    )


async def create_repo(request: Request) -> Response:
    """A new repository; 409 with the same answer when it exists."""
    hub, body = hub_of(request), await request.json()
    account = hub.accounts.of(request)
    owner = body.get("organization") or (account.name if account else "")
    hub.accounts.require_write(account, owner)
    repo_type, repo_id = body.get("type") or "model", f"{owner}/{body['name']}"
    if repo_type not in REPO_TYPES:
        raise HubError(400, f"Invalid repo type: {repo_type}")
    if repo_type == "space" and not body.get("sdk"):
        raise HubError(400, "A space needs an sdk")
    prefix = "" if repo_type == "model" else f"{repo_type}s/"
    answer = {"url": f"{hub.url}/{prefix}{repo_id}", "name": repo_id, "id": repo_id}
    if hub.store.find(repo_type, repo_id):
        return JSONResponse(answer | {"error": f"You already created this {repo_type} repo"}, 409)
    private = body.get("private", body.get("visibility", "public") == "private")
    hub.store.create(repo_type, repo_id, private=private, sdk=body.get("sdk"))
    return JSONResponse(answer)


async def delete_repo(request: Request) -> Response:
    """Remove a repository."""
    hub, body = hub_of(request), json.loads(await request.body())
    account = hub.accounts.of(request)
    owner = body.get("organization") or (account.name if account else "")
    repo_type, repo_id = body.get("type") or "model", f"{owner}/{body['name']}"
    repo, _ = hub.accounts.writable_repo(hub.store, request, repo_type, repo_id)
    hub.store.delete(repo)
    return JSONResponse({})


async def change_settings(request: Request) -> Response:
    """Visibility and gating."""
    repo, _ = writable_repo(request)
    body = await request.json()
    changes = {}
    if "visibility" in body or "private" in body:
        changes["private"] = body.get("private", body.get("visibility") == "private")
    if "gated" in body:
        changes["gated"] = body["gated"]
    repo.change_settings(**changes)
    return JSONResponse(changes)


def repo_document(request: Request, repo: Repo, commit: Commit) -> dict[str, Any]:
    """What the Hub tells about a repository at a commit, without its files."""
    settings = repo.settings
    readme = commit.files.get("README.md")
    text = hub_of(request).blobs.path(readme.sha256).read_text(errors="replace") if readme else ""
    card = split_card(text)[0] or {}
    tags = card.get("tags", [])
    tags = [tags] if isinstance(tags, str) else list(tags)
    tags += [card[key] for key in ("library_name", "pipeline_tag") if card.get(key)]
    for key, prefix in (("license", "license"), ("datasets", "dataset"), ("base_model", "base_model")):
        values = card.get(key) or []
        tags += [f"{prefix}:{value}" for value in ([values] if isinstance(values, str) else values)]
    return {
        "_id": commit.id[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.owner,
        "sha": commit.id,
        "lastModified": commit.date,
        "createdAt": settings["createdAt"],
        "private": settings["private"],
        "gated": settings["gated"],
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": list(dict.fromkeys(tags)),
        "pipeline_tag": card.get("pipeline_tag"),
        "library_name": card.get("library_name"),
        "cardData": card,
        "sdk": settings["sdk"],
    }


async def repo_info(request: Request) -> Response:
    """A repository at a revision, with its files."""
    repo = readable_repo(request)
    commit = repo.commit(request.path_params.get("revision", "main"))
    siblings = []
    for path, entry in commit.files.items():
        sibling: dict[str, Any] = {"rfilename": path}
        if request.query_params.get("blobs"):
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.lfs:
                pointer_size = len(lfs_pointer(entry.sha256, entry.size))
                sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": pointer_size}
        siblings.append(sibling)
    return JSONResponse(repo_document(request, repo, commit) | {"siblings": siblings})


async def list_repos(request: Request) -> Response:
    """The repositories of a type that the caller may see, newest first."""
    hub, query = hub_of(request), request.query_params
    account = hub.accounts.of(request)
    found = []
    for repo in hub.store.repos(request.path_params["kind"].removesuffix("s")):
        if repo.settings["private"] and not hub.accounts.belongs(account, repo.owner):
            continue
        if repo.owner != query.get("author", repo.owner) or query.get("search", "").lower() not in repo.id.lower():
            continue
        document = repo_document(request, repo, repo.commit("main"))
        wanted = {*query.getlist("filter"), *query.getlist("pipeline_tag")}
        if wanted <= set(document["tags"]):
            found.append(document)
    found.sort(key=lambda document: document["lastModified"], reverse=True)
    return paged(request, found, lambda document: document)


async def list_refs(request: Request) -> Response:
    """Branches, tags and, on demand, pull requests."""
    repo = readable_repo(request)

    def render(kind: str, prefix: str) -> list[dict[str, str]]:
        refs = repo.refs(kind).items()
        return [{"name": name, "ref": f"{prefix}{name}", "targetCommit": commit} for name, commit in refs]

    answer = {"branches": render("heads", "refs/heads/"), "tags": render("tags", "refs/tags/"), "converts": []}
    if request.query_params.get("include_prs"):
        answer["pullRequests"] = render("pr", "refs/pr/")
    return JSONResponse(answer)


async def create_ref(request: Request) -> Response:
    """A tag at a revision, or a branch that starts at one; 409 when the name is taken."""
    repo, _ = writable_repo(request)
    body = json.loads(await request.body() or b"{}")
    if request.path_params["what"] == "tag":
        kind, name, start = "tags", body["tag"], request.path_params["revision"]
    else:
        kind, name, start = "heads", request.path_params["revision"], body.get("startingPoint") or "main"
    if name in repo.refs(kind):
        raise HubError(409, f"Reference already exists: {name}")
    repo.set_ref(kind, name, repo.commit_id(start))
    return JSONResponse({})


async def delete_ref(request: Request) -> Response:
    """Forget a tag or a branch."""
    repo, _ = writable_repo(request)
    kind = {"tag": "tags", "branch": "heads"}[request.path_params["what"]]
    if (kind, request.path_params["revision"]) == ("heads", "main"):
        raise HubError(403, "The branch main cannot be deleted")
    repo.delete_ref(kind, request.path_params["revision"])
    return JSONResponse({})


async def validate_yaml(request: Request) -> Response:
    """Check a card before it is uploaded."""
    body = await request.json()
    errors, warnings = check_card(body["content"], body.get("repoType", "model"))
    answer = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return JSONResponse(answer, 400 if errors else 200)


async def grant_access(request: Request) -> Response:
    """Let a user into a gated repository."""
    repo, _ = writable_repo(request)
    user = (await request.json())["user"]
    repo.change_settings(granted=sorted({*repo.settings["granted"], user}))
    return JSONResponse({})


async def check_access(request: Request) -> Response:
    """Whether the caller may read the files or, under /write, change them."""
    repo = readable_repo(request)
    hub_of(request).accounts.require_file_access(request, repo)
    if request.url.path.endswith("/write"):
        writable_repo(request)
    return JSONResponse({})


async def list_discussions(request: Request) -> Response:
    """No discussions are kept."""
    readable_repo(request)
    return JSONResponse({"discussions": [], "count": 0, "start": 0})


async def no_such_repo(request: Request) -> Response:
    """Ids without an owner, which this Hub does not have."""
    raise repo_not_found(anonymous=hub_of(request).accounts.of(request) is None)


REPO = "/api/{kind:kind}/{owner}/{name}"
ROUTES = [
    Route("/api/whoami-v2", whoami),
    Route("/api/repos/create", create_repo, methods=["POST"]),
    Route("/api/repos/delete", delete_repo, methods=["DELETE"]),
    Route("/api/validate-yaml", validate_yaml, methods=["POST"]),
    Route("/api/{kind:kind}", list_repos),
    Route("/api/{kind:kind}/{name}", no_such_repo),
    Route(REPO, repo_info),
    Route(REPO + "/revision/{revision:segment}", repo_info),
    Route(REPO + "/settings", change_settings, methods=["PUT"]),
    Route(REPO + "/refs", list_refs),
    Route(REPO + "/{what:ref}/{revision:segment}", create_ref, methods=["POST"]),
    Route(REPO + "/{what:ref}/{revision:segment}", delete_ref, methods=["DELETE"]),
    Route(REPO + "/user-access-request/grant", grant_access, methods=["POST"]),
    Route(REPO + "/auth-check", check_access),
    Route(REPO + "/auth-check/write", check_access),
    Route(REPO + "/discussions", list_discussions),
]
