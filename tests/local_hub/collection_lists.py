"""Endpoints about collections: titled lists of repositories."""

import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .context import Hub, hub_of, paged
from .errors import HubError, repo_not_found
from .store import now, write_atomically

ITEM_TYPES = ("model", "dataset", "space", "paper", "collection")


def _folder(hub: Hub) -> Path:
    return hub.store.root / "collections"


def _all(hub: Hub) -> Iterator[dict[str, Any]]:
    for file in sorted(_folder(hub).glob("[0-9a-f]*.json")):
        yield json.loads(file.read_bytes())


def _save(hub: Hub, collection: dict[str, Any]) -> None:
    for position, item in enumerate(collection["items"]):
        item["position"] = position
    collection["lastUpdated"] = now()
    write_atomically(_folder(hub) / f"{collection['_id']}.json", json.dumps(collection).encode())


def _slug(owner: str, title: str, identifier: str) -> str:
    return f"{owner}/{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}-{identifier}"


def _shown(hub: Hub, request: Request, collection: dict[str, Any]) -> bool:
    return not collection["private"] or hub.accounts.belongs(hub.accounts.of(request), collection["owner"]["name"])


def _requested(request: Request) -> dict[str, Any]:
    """The collection in the path: found by the id at the end of its slug, since titles change."""
    hub, identifier = hub_of(request), request.path_params["slug"].rsplit("-", 1)[-1]
    file = _folder(hub) / f"{identifier}.json"
    if re.fullmatch(r"[0-9a-f]{24}", identifier) and file.is_file():
        collection: dict[str, Any] = json.loads(file.read_bytes())
        if collection["owner"]["name"] == request.path_params["owner"] and _shown(hub, request, collection):
            return collection
    raise HubError(404, "Collection not found")


def _writable(request: Request) -> dict[str, Any]:
    collection = _requested(request)
    accounts = hub_of(request).accounts
    accounts.require_write(accounts.of(request), collection["owner"]["name"])
    return collection


def _item(collection: dict[str, Any], item_id: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [item for item in collection["items"] if item["_id"] == item_id]
    if not found:
        raise HubError(404, "Collection item not found")
    return found[0]


async def create_collection(request: Request) -> Response:
    """A new collection; 409 with its slug when the owner has one of this title."""
    hub, body = hub_of(request), await request.json()
    owner, title = body["namespace"], body["title"]
    hub.accounts.require_write(hub.accounts.of(request), owner)
    if not title or len(title) > 60:
        raise HubError(400, "The title of a collection has 1 to 60 characters")
    if len(body.get("description") or "") > 150:
        raise HubError(400, "The description of a collection has at most 150 characters")
    for collection in _all(hub):
        if (collection["owner"]["name"], collection["title"]) == (owner, title):
            return JSONResponse({"error": "Collection already exists", "slug": collection["slug"]}, 409)
    identifier = secrets.token_hex(12)
    collection = {
        "_id": identifier,
        "slug": _slug(owner, title, identifier),
        "title": title,
        "description": body.get("description"),
        "owner": {"name": owner, "type": "org" if owner in hub.accounts.organizations else "user"},
        "private": bool(body.get("private")),
        "theme": "orange",
        "upvotes": 0,
        "position": 0,
        "items": [],
    }
    _save(hub, collection)
    return JSONResponse(collection)


async def list_collections(request: Request) -> Response:
    """Collections by owner or by an item such as models/alice/model, each with at most four of its items."""
    hub, query = hub_of(request), request.query_params
    found = []
    for collection in _all(hub):
        items = {f"{item['type']}s/{item['id']}" for item in collection["items"]}
        by_owner = query.get("owner", collection["owner"]["name"]) == collection["owner"]["name"]
        if by_owner and ("item" not in query or query["item"] in items) and _shown(hub, request, collection):
            found.append(collection | {"items": collection["items"][:4]})
    # The client numbers them itself.
    return paged(request, found, lambda collection: {k: v for k, v in collection.items() if k != "position"})


async def get_collection(request: Request) -> Response:
    """A collection with all its items."""
    return JSONResponse(_requested(request))


async def change_collection(request: Request) -> Response:
    """Title, description, theme, position or privacy."""
    collection, body = _writable(request), await request.json()
    collection |= {key: body[key] for key in ("title", "description", "theme", "position", "private") if key in body}
    collection["slug"] = _slug(collection["owner"]["name"], collection["title"], collection["_id"])
    _save(hub_of(request), collection)
    return JSONResponse({"success": True, "data": collection})


async def delete_collection(request: Request) -> Response:
    """Remove a collection."""
    collection = _writable(request)
    (_folder(hub_of(request)) / f"{collection['_id']}.json").unlink()
    return JSONResponse({})


async def add_item(request: Request) -> Response:
    """Add a repository at the end; 409 when it is there already, 404 when there is no such repository."""
    hub, collection, body = hub_of(request), _writable(request), await request.json()
    kind, item_id = body["item"]["type"], body["item"]["id"]
    if kind not in ITEM_TYPES:
        raise HubError(400, f"Invalid item type: {kind}")
    if kind in ("model", "dataset", "space") and hub.store.find(kind, item_id) is None:
        raise repo_not_found(anonymous=False)
    if any((item["type"], item["id"]) == (kind, item_id) for item in collection["items"]):
        raise HubError(409, "Item already exists in the collection")
    item: dict[str, Any] = {"_id": secrets.token_hex(12), "id": item_id, "type": kind}
    if body.get("note"):
        item["note"] = {"text": body["note"], "html": body["note"]}
    collection["items"].append(item)
    _save(hub, collection)
    return JSONResponse(collection)


async def change_item(request: Request) -> Response:
    """The note or the place of an item."""
    collection, body = _writable(request), await request.json()
    item = _item(collection, request.path_params["item"])
    if "note" in body:
        item["note"] = {"text": body["note"], "html": body["note"]}
    if "position" in body:
        collection["items"].remove(item)
        collection["items"].insert(body["position"], item)
    _save(hub_of(request), collection)
    return JSONResponse({"success": True})


async def delete_item(request: Request) -> Response:
    """Take an item out."""
    collection = _writable(request)
    collection["items"].remove(_item(collection, request.path_params["item"]))
    _save(hub_of(request), collection)
    return JSONResponse({"success": True})


COLLECTION = "/api/collections/{owner}/{slug}"
ROUTES = [
    Route("/api/collections", list_collections),
    Route("/api/collections", create_collection, methods=["POST"]),
    Route(COLLECTION, get_collection),
    Route(COLLECTION, change_collection, methods=["PATCH"]),
    Route(COLLECTION, delete_collection, methods=["DELETE"]),
    Route(COLLECTION + "/items", add_item, methods=["POST"]),
    Route(COLLECTION + "/items/{item}", change_item, methods=["PATCH"]),
    Route(COLLECTION + "/items/{item}", delete_item, methods=["DELETE"]),
]
