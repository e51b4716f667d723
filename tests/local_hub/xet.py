"""The content store of the Xet protocol: xorbs (packed chunks) and shards (which chunks make which file).

A file that arrives this way is put together once and kept as a blob under its sha256, which is checked, so that
every other endpoint, and clients without Xet, see it like any other LFS file.
"""

import hashlib
import json
import secrets
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from .context import Hub, hub_of, readable_repo, writable_repo
from .errors import HubError
from .repos import REPO
from .store import Store, write_atomically

RECORD = 48  # bytes of every record in a shard
VERIFICATION_FOLLOWS, METADATA_FOLLOWS = 1 << 31, 1 << 30
END_OF_SECTION = b"\xff" * 32
TOKEN_SECONDS = 3600


@dataclass(frozen=True)
class Term:
    """Chunks `start` to `end` (exclusive) of a xorb; `size` is their unpacked length in bytes."""

    xorb: str
    size: int
    start: int
    end: int


@dataclass(frozen=True)
class ShardFile:
    """A file as a shard describes it."""

    hash: str
    sha256: str | None
    terms: list[Term]


def hash_text(raw: bytes) -> str:
    """A 32-byte hash as Xet writes it: four little-endian 64-bit numbers in hexadecimal."""
    return "".join(raw[start : start + 8][::-1].hex() for start in range(0, 32, 8))


def _number(data: bytes, offset: int, size: int = 4) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def parse_shard(data: bytes) -> list[ShardFile]:
    """The files that a shard announces."""
    files, offset = [], RECORD
    while (raw_hash := data[offset : offset + 32]) != END_OF_SECTION:
        if len(raw_hash) < 32:
            raise HubError(400, "the shard ends within its list of files")
        flags, count = _number(data, offset + 32), _number(data, offset + 36)
        records = range(offset + RECORD, offset + RECORD * (1 + count), RECORD)
        terms = [
            Term(hash_text(data[at : at + 32]), _number(data, at + 36), _number(data, at + 40), _number(data, at + 44))
            for at in records
        ]
        offset += RECORD * (1 + count * (2 if flags & VERIFICATION_FOLLOWS else 1))
        sha256 = None
        if flags & METADATA_FOLLOWS:
            sha256 = hash_text(data[offset : offset + 32])
            offset += RECORD
        files.append(ShardFile(hash_text(raw_hash), sha256, terms))
    return files


def chunk_offsets(xorb: bytes) -> list[int]:
    """Where each packed chunk of a xorb begins, and where the last one ends."""
    offsets = [0]
    # A footer, if any, begins with its name and not with the version number 0.
    while offsets[-1] + 8 <= len(xorb) and xorb[offsets[-1]] == 0:
        offsets.append(offsets[-1] + 8 + _number(xorb, offsets[-1] + 1, 3))
    if offsets[-1] > len(xorb):
        raise HubError(400, "the xorb ends within a chunk")
    return offsets


def unpack_chunk(chunk: bytes) -> bytes:
    """The content of a packed chunk (with its header of 8 bytes): stored, LZ4, or LZ4 of bytes in four groups."""
    scheme, size, packed = chunk[4], _number(chunk, 5, 3), chunk[8:]
    if scheme == 0:
        return packed
    content: bytes = bytes(imagecodecs.lz4f_decode(packed))
    if scheme == 1:
        return content
    grouped, content_array, start = np.frombuffer(content, np.uint8), np.empty(size, np.uint8), 0
    for group in range(4):
        length = len(range(group, size, 4))
        content_array[group::4] = grouped[start : start + length]
        start += length
    return content_array.tobytes()


class Cas:
    """Xorbs and files below one folder, and the tokens that were given out."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = store.root / "xet"
        self.tokens: dict[str, float] = {}

    def new_token(self) -> tuple[str, int]:
        """A token for reading and writing, and the second at which it ends."""
        token, expiry = f"xet_{secrets.token_hex(16)}", int(time.time()) + TOKEN_SECONDS
        self.tokens[token] = expiry
        return token, expiry

    def require_token(self, request: Request) -> None:
        """Refuse whoever has no token that is still good."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.tokens.get(token, 0) < time.time():
            raise HubError(401, "no valid Xet token")

    def xorb(self, name: str) -> Path:
        """Where a xorb is kept."""
        if len(name) != 64 or not set(name) <= set("0123456789abcdef"):
            raise HubError(400, f"not a hash: {name}")
        return self.folder / "xorbs" / name

    def file_hash(self, sha256: str) -> str | None:
        """The Xet hash of the file with this sha256, None when it did not arrive by Xet."""
        path = self.folder / "by_sha256" / sha256
        return path.read_text() if path.is_file() else None

    def register(self, file: ShardFile) -> None:
        """Put a file together from its chunks, check it, and make it known."""
        temporary, digest = self.store.temporary(), hashlib.sha256()
        with temporary.open("wb") as stream:
            for term in file.terms:
                content = self._unpack(term)
                digest.update(content)
                stream.write(content)
        sha256 = file.sha256 or digest.hexdigest()
        self.store.blobs.adopt(temporary, sha256)
        terms = json.dumps([asdict(term) for term in file.terms])
        write_atomically(self.folder / "files" / f"{file.hash}.json", terms.encode())
        write_atomically(self.folder / "by_sha256" / sha256, file.hash.encode())

    def _unpack(self, term: Term) -> bytes:
        path = self.xorb(term.xorb)
        if not path.is_file():
            raise HubError(400, f"the shard names a xorb that was not uploaded: {term.xorb}")
        data = path.read_bytes()
        offsets = chunk_offsets(data)[term.start : term.end + 1]
        content = b"".join(unpack_chunk(data[a:b]) for a, b in pairwise(offsets))
        if len(content) != term.size:
            raise HubError(400, f"chunks {term.start} to {term.end} of {term.xorb} have another size than announced")
        return content

    def terms(self, file_hash: str, first: int, last: int | None) -> tuple[list[Term], int]:
        """The terms that hold bytes `first` to `last` (inclusive, None for the end) of a file; where they begin."""
        path = self.folder / "files" / f"{file_hash}.json"
        if not path.is_file():
            raise HubError(404, "file not found")
        terms: list[Term] = []
        position = offset = 0
        for term in (Term(**document) for document in json.loads(path.read_bytes())):
            begin, position = position, position + term.size
            if position <= first or (last is not None and begin > last):
                continue
            if not terms:
                offset = first - begin
            terms.append(term)
        if not terms and first > 0:
            raise HubError(416, "the range begins behind the end of the file")
        return terms, offset

    def ranges(self, xorb: str, terms: list[Term]) -> list[tuple[dict[str, int], dict[str, int]]]:
        """The chunks (end exclusive) and bytes (end inclusive) of a xorb that these terms need, in order."""
        spans: list[list[int]] = []
        for start, end in sorted((term.start, term.end) for term in terms if term.xorb == xorb):
            if spans and start <= spans[-1][1]:
                spans[-1][1] = max(end, spans[-1][1])
            else:
                spans.append([start, end])
        at = chunk_offsets(self.xorb(xorb).read_bytes())
        return [({"start": a, "end": b}, {"start": at[a], "end": at[b] - 1}) for a, b in spans]


def _cas(request: Request) -> Cas:
    cas: Cas | None = hub_of(request).xet
    if cas is None:
        raise HubError(404, "this Hub has no Xet store")
    return cas


def _connection(hub: Hub, cas: Cas) -> Response:
    token, expiry = cas.new_token()
    url = f"{hub.url}/xet"
    headers = {"X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expiry), "X-Xet-Cas-Url": url}
    return JSONResponse({"accessToken": token, "exp": expiry, "casUrl": url}, headers=headers)


async def write_token(request: Request) -> Response:
    """How to reach the store, for whoever may write to the repository."""
    writable_repo(request)
    return _connection(hub_of(request), _cas(request))


async def read_token(request: Request) -> Response:
    """How to reach the store, for whoever may read the repository's files."""
    hub_of(request).accounts.require_file_access(request, readable_repo(request))
    return _connection(hub_of(request), _cas(request))


async def put_xorb(request: Request) -> Response:
    """Keep a xorb."""
    cas = _cas(request)
    cas.require_token(request)
    path, body = cas.xorb(request.path_params["hash"]), await request.body()
    chunk_offsets(body)
    inserted = not path.is_file()
    write_atomically(path, body)
    return JSONResponse({"was_inserted": inserted})


async def put_shard(request: Request) -> Response:
    """Make known the files of a shard."""
    cas = _cas(request)
    cas.require_token(request)
    for file in parse_shard(await request.body()):
        cas.register(file)
    return JSONResponse({"result": 1})


async def reconstruct(request: Request) -> Response:
    """How to put together a file or a range of it. Version 2 names each xorb once, version 1 each of its ranges."""
    cas = _cas(request)
    cas.require_token(request)
    first, _, last = request.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
    terms, offset = cas.terms(request.path_params["hash"], int(first), int(last) if last else None)
    answer: dict[str, Any] = {
        "offset_into_first_range": offset,
        "terms": [
            {"hash": t.xorb, "unpacked_length": t.size, "range": {"start": t.start, "end": t.end}} for t in terms
        ],
    }
    xorbs, fetch_info = {}, {}
    for xorb in dict.fromkeys(term.xorb for term in terms):
        url = f"{hub_of(request).cdn_url}/xet/content/{xorb}"
        ranges = cas.ranges(xorb, terms)
        xorbs[xorb] = [{"url": url, "ranges": [{"chunks": chunks, "bytes": span} for chunks, span in ranges]}]
        fetch_info[xorb] = [{"url": url, "range": chunks, "url_range": span} for chunks, span in ranges]
    is_first_version = request.path_params["version"] == 1
    return JSONResponse(answer | ({"fetch_info": fetch_info} if is_first_version else {"xorbs": xorbs}))


async def deliver_xorb(request: Request) -> Response:
    """Bytes of a xorb, without a token, as from a CDN."""
    path = _cas(request).xorb(request.path_params["hash"])
    if not path.is_file():
        raise HubError(404, "no such xorb")
    return FileResponse(path, media_type="application/octet-stream")


ROUTES = [
    Route(REPO + "/xet-write-token/{revision:segment}", write_token),
    Route(REPO + "/xet-read-token/{revision:segment}", read_token),
    Route("/xet/v1/xorbs/default/{hash}", put_xorb, methods=["POST"]),
    Route("/xet/v1/shards", put_shard, methods=["POST"]),
    Route("/xet/v{version:int}/reconstructions/{hash}", reconstruct),
    Route("/xet/content/{hash}", deliver_xorb),
]
