"""Getting models from the Hub, checked against their manifest, with errors that say what to do."""

import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
from huggingface_hub import HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from polypseg import zoo
from polypseg.errors import PolypSegError, UsageError, first_line, unknown_name
from polypseg.provenance.checksums import (
    LOADED,
    MANIFEST,
    NOT_LOADED,
    Verification,
    describe_problems,
    inspect_folder,
    is_loaded,
    verify_folder,
)
from polypseg.provenance.local import STARTER, local_folder

ORGANIZATION = "polypseg"
"""Whose models a bare model id or short name means; ``POLYPSEG_ORGANISATION`` replaces it."""
_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[\w.-]+/[\w.-]+?)(?:/(?:tree|blob)/(?P<revision>[^/]+).*)?/?"
)
_log = logging.getLogger(__name__)


def organization() -> str:
    """The Hub user or organization whose models bare ids mean."""
    return os.environ.get("POLYPSEG_ORGANISATION") or ORGANIZATION


def resolve_id(name: str) -> str:
    """``RN-IN-MC`` or a bare model id -> the repository's id; the page's address -> its id; OWNER/NAME stays.

    Raises UsageError for an unknown name, and for the address of a revision's page.
    """
    page = _PAGE.fullmatch(name)
    if page is not None and page["revision"]:
        raise UsageError(f"{name} is the page of a revision: give {page['id']} and the revision {page['revision']}")
    if page is not None:
        return page["id"]
    if "/" in name:
        return name
    names = {key: entry.model_id for entry in zoo.rows() for key in (entry.model_id, entry.short_name)}
    known = names.get(name)
    if known is None and "." not in name:  # no id of the table's grammar: most likely a mistyped short name
        raise unknown_name("model", name, [STARTER, *names])
    return f"{organization()}/{known or name}"


def fetch(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
    files: Sequence[str] = LOADED,
) -> Path:
    """Download ``files`` (patterns; default: what transformers reads) of a Hub model and return the checked folder.

    The errors are those of ``polypseg.load``.
    """
    found = _fetch_checked(resolve_id(name), revision=revision, cache_dir=cache_dir, token=token, files=files)
    return found.folder


def verify(
    id_or_path: str | Path, *, revision: str | None = None, cache_dir: Path | None = None, token: str | None = None
) -> Verification:
    """Compare every file of a model folder, or of a Hub repository after downloading it, with the manifest.

    Raises UsageError and PolypSegError as ``load`` does, UsageError for a model without manifest. What is wrong with
    files is returned, not raised; a damaged download has been fetched again once before.
    """
    folder = local_folder(id_or_path)
    if folder is not None:
        return verify_folder(folder)
    found = _fetch_checked(resolve_id(str(id_or_path)), revision=revision, cache_dir=cache_dir, token=token, files=None)
    if not found.digests and not found.problems:
        raise UsageError(f"{id_or_path} has no {MANIFEST}: it was not published by `polypseg push`")
    return found


def _fetch_checked(
    repo_id: str,
    *,
    revision: str | None,
    cache_dir: Path | None,
    token: str | None,
    files: Sequence[str] | None,
) -> Verification:
    """Download ``files`` (patterns; None: everything), compare them, and fetch once more what is damaged."""
    wanted = None if files is None else partial(is_loaded, names=files)
    with hub_errors(repo_id, revision=revision), without_retries_when_offline():
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                allow_patterns=None if files is None else [*files, MANIFEST],
                ignore_patterns=None if files is None else list(NOT_LOADED),
            )
        )
        if not (folder / MANIFEST).is_file():
            _log.warning("%s has no %s: its files cannot be checked", repo_id, MANIFEST)
            return Verification(folder=folder, revision=folder.name, digests={}, problems={})
        found = inspect_folder(folder, revision=folder.name, wanted=wanted)
        if found.problems:
            _fetch_again(repo_id, found, cache_dir=cache_dir, token=token)
            found = inspect_folder(folder, revision=folder.name, wanted=wanted)
    if found.problems and files is not None:
        raise PolypSegError(
            f"{repo_id}: {describe_problems(found.problems)} after a second download: the copy on the server does not "
            f"match its {MANIFEST}; tell the model's publisher"
        )
    return found


def _fetch_again(repo_id: str, found: Verification, *, cache_dir: Path | None, token: str | None) -> None:
    """Replace damaged cached files, of exactly the same commit."""
    names = sorted(found.problems)
    _log.warning("%s: %s damaged in the cache or on the way; fetching again", repo_id, ", ".join(names))
    try:
        snapshot_download(
            repo_id,
            revision=found.revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=[*names, MANIFEST],
            force_download=True,
        )
    except (OSError, ValueError) as error:
        # No network, offline mode, or a cache that may not be written.
        raise PolypSegError(
            f"{', '.join(names)} of {repo_id} is damaged in the cache ({found.folder}) and cannot be fetched again: "
            f"{first_line(error)}"
        ) from error


_REACH_SECONDS = 5.0
"""How long the Hub, or the proxy before it, may take to accept a connection, and to answer."""


def hub_is_reachable() -> bool:
    """Whether the Hub's server, or the proxy that leads to it, accepts a connection, and whether the Hub answers.

    A server that takes connections and is silent or busy would be asked for minutes by the client.
    """
    address = urlsplit(constants.ENDPOINT)
    proxy = getproxies().get(address.scheme)
    if proxy and not proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname, port), timeout=_REACH_SECONDS):
            pass
        status = get_session().head(constants.ENDPOINT, timeout=_REACH_SECONDS).status_code
    except OSError:
        return False
    except httpx2.HTTPError as error:  # of certificates too
        _log.warning("%s: %s", constants.ENDPOINT, first_line(error))
        return False
    if status >= 500:
        _log.warning("%s answers %s", constants.ENDPOINT, status)
    return status < 500


@contextmanager
def without_retries_when_offline() -> Iterator[None]:
    """Within it the Hub's client uses its cache only, where the Hub cannot be reached.

    The client would repeat every request for some hundred seconds without a network before it looks there.
    """
    before = constants.HF_HUB_OFFLINE
    if not before and not hub_is_reachable():
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def hub_errors(repo_id: str, *, revision: str | None = None) -> Iterator[None]:
    """Turn the Hub client's errors into one line that says what is wrong and what to do."""
    at = f" at revision {revision!r}" if revision else ""
    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except GatedRepoError as error:
        raise UsageError(f"{repo_id} is gated: ask for access on its page, then {login}") from error
    except RepositoryNotFoundError as error:
        raise UsageError(f"{repo_id} does not exist, or is private: check the id, or {login}") from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{repo_id} has no revision {revision!r}: give a tag, branch or commit of it") from error
    except HFValidationError as error:
        raise UsageError(f"{repo_id!r} is neither a folder nor a Hub id (owner/name): {first_line(error)}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise PolypSegError(
            f"{repo_id}{at} is not in the cache and the Hub cannot be reached (no network, or HF_HUB_OFFLINE is set): "
            "connect once, or copy the model folder here and give its path"
        ) from error
    except PermissionError as error:
        raise PolypSegError(
            f"cannot write the download of {repo_id} to {error.filename}: set HF_HOME to a folder that you may write to"
        ) from error
    except EntryNotFoundError as error:
        raise PolypSegError(f"{repo_id}{at} lacks a file that it should have: {first_line(error)}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        stale = "the repository was changed by somebody else meanwhile: run the push again"
        advice = {401: f"the token is not valid: {login}", 403: "the token may not do this: use one with write access"}
        advice |= {409: stale, 412: stale}
        raise PolypSegError(f"{repo_id}{at}: {advice.get(status or 0, first_line(error))}") from error
    except (httpx2.HTTPError, ConnectionError) as error:
        raise PolypSegError(f"{repo_id}{at}: the Hub cannot be reached ({first_line(error)}): try again") from error
    except OSError as error:  # a full disk, a cache that is not a folder
        raise PolypSegError(f"{repo_id}{at}: {first_line(error)}") from error
    except RuntimeError as error:  # hf-xet's own errors have no other type
        raise PolypSegError(f"{repo_id}{at}: the transfer failed ({first_line(error)}): try again") from error


def hub_api(*, token: str | None = None) -> HfApi:
    """The client; the token comes from the standard places unless given."""
    return HfApi(token=token, library_name="polypseg")
