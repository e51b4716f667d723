"""What every endpoint works with: the store, the accounts, the server's own addresses, and answers in pages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlencode

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .access import Account, Accounts
from .store import Blobs, Repo, Store

SLASH_IN_SEGMENT = "\x1f"


@dataclass(frozen=True)
class Hub:
    """The server's state. `url` is the Hub; `cdn_url` is the same server under another host name."""

    store: Store
    accounts: Accounts
    url: str
    cdn_url: str
    page_size: int
    part_size: int
    xet: Any | None

    @property
    def blobs(self) -> Blobs:
        """All content."""
        return self.store.blobs


def hub_of(request: Request) -> Hub:
    """The server's state."""
    hub: Hub = request.app.state.hub
    return hub


def _requested(request: Request) -> tuple[str, str]:
    values = request.path_params
    return values.get("kind", "models").removesuffix("s"), f"{values['owner']}/{values['name'].removesuffix('.git')}"


def readable_repo(request: Request) -> Repo:
    """The repository in the request's path."""
    hub = hub_of(request)
    return hub.accounts.readable_repo(hub.store, request, *_requested(request))


def writable_repo(request: Request) -> tuple[Repo, Account]:
    """The repository in the request's path and the account that may write to it."""
    hub = hub_of(request)
    return hub.accounts.writable_repo(hub.store, request, *_requested(request))


def paged(request: Request, items: Sequence[Any], render: Callable[[Any], Any]) -> Response:
    """One page of a list; a Link header leads to the next."""
    start = int(request.query_params.get("cursor", 0))
    size = min(int(request.query_params.get("limit", hub_of(request).page_size)), hub_of(request).page_size)
    response = JSONResponse([render(item) for item in items[start : start + size]])
    if start + size < len(items):
        query = [(key, value) for key, value in request.query_params.multi_items() if key != "cursor"]
        address = hub_of(request).url + request.scope["raw_path"].decode()
        response.headers["Link"] = f'<{address}?{urlencode([*query, ("cursor", start + size)])}>; rel="next"'
    return response


class SegmentConvertor(Convertor[str]):
    """One segment of a path, in which an encoded slash was part of a name such as refs/pr/1."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return value.replace(SLASH_IN_SEGMENT, "/")

    def to_string(self, value: str) -> str:
        return value.replace("/", SLASH_IN_SEGMENT)


class KindConvertor(SegmentConvertor):
    """The plural of a repository type, as paths have it."""

    regex = "models|datasets|spaces"


class RefConvertor(SegmentConvertor):
    """What a name of a commit can be."""

    regex = "tag|branch"


register_url_convertor("ref", RefConvertor())
register_url_convertor("segment", SegmentConvertor())
register_url_convertor("kind", KindConvertor())


class EncodedSlashes:
    """Keep %2F apart from / while the path is matched with the routes; `SegmentConvertor` restores it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            parts = scope["raw_path"].decode("ascii").replace("%2f", "%2F").split("%2F")
            scope = {**scope, "path": SLASH_IN_SEGMENT.join(unquote(part) for part in parts)}
        await self.app(scope, receive, send)
