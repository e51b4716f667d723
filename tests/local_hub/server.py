"""The server put together: endpoints, the layer that keeps encoded slashes apart, and the layer of faults."""

from pathlib import Path

from starlette.applications import Starlette
from starlette.types import ASGIApp

from . import collection_lists, files, repos, uploads, xet
from .access import Accounts
from .context import EncodedSlashes, Hub
from .errors import HubError, render_error
from .faults import FaultInjection, Faults
from .store import Store

ROUTES = [*repos.ROUTES, *files.ROUTES, *uploads.ROUTES, *xet.ROUTES, *collection_lists.ROUTES]


def build_server(
    root: Path,
    *,
    url: str,
    cdn_url: str,
    accounts: Accounts,
    with_xet: bool,
    page_size: int = 100,
    part_size: int = 5 * 2**20,
) -> ASGIApp:
    """The Hub whose data are in `root`. Lists come `page_size` at a time, LFS objects in parts of `part_size` bytes."""
    faults = Faults()
    store = Store(root, before_step=faults.before_step)
    store.discard_unfinished()
    app = Starlette(routes=ROUTES, exception_handlers={HubError: render_error})
    app.router.redirect_slashes = False
    app.state.hub = Hub(store, accounts, url, cdn_url, page_size, part_size, xet.Cas(store) if with_xet else None)
    return FaultInjection(EncodedSlashes(app), faults)
