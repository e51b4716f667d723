"""What goes wrong on demand, and the log of all requests.

POST /_control takes one fault as JSON, DELETE /_control forgets all, GET /_requests returns the log and DELETE
/_requests empties it. A fault has `match`, a regular expression searched in "METHOD /path?query", `times` (default
1, below 0 for ever), and `action`:

    status        answer `status` (default 503) with `headers`; the endpoint is not asked
    delay         wait `seconds` before the endpoint is asked
    cut_response  break the connection after `after` bytes of the body
    cut_request   break the connection after `after` bytes of the request's body arrived
    flip          change one byte of the answer's body, at offset `after`
    crash         the process kills itself before the step of a commit that `match` names:
                  "manifest" (nothing written), "branch" (commit written, not visible), "answer" (visible, not told)
"""

import asyncio
import os
import re
import signal
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ACTIONS = ("status", "delay", "cut_response", "cut_request", "flip", "crash")


@dataclass
class Fault:
    """One thing that goes wrong; see the module."""

    match: str
    action: str
    times: int = 1
    status: int = 503
    after: int = 0
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"unknown action {self.action!r}; choose from {', '.join(ACTIONS)}")
        re.compile(self.match)


class Faults:
    """The faults that are still to happen and the requests that came."""

    def __init__(self) -> None:
        self.pending: list[Fault] = []
        self.requests: list[dict[str, Any]] = []

    def take(self, text: str, *actions: str) -> list[Fault]:
        """The faults that hit this text; each is used up by one."""
        hits = [fault for fault in self.pending if fault.action in actions and re.search(fault.match, text)]
        for fault in hits:
            fault.times -= 1
        self.pending = [fault for fault in self.pending if fault.times != 0]
        return hits

    def before_step(self, step: str) -> None:
        """Kill this process if a fault says so."""
        if self.take(step, "crash"):
            os.kill(os.getpid(), signal.SIGKILL)


class ConnectionCutError(BaseException):
    """The connection is to break here; no Exception, which the framework would turn into an answer 500."""


class FaultInjection:
    """The outermost layer of the server."""

    def __init__(self, app: ASGIApp, faults: Faults) -> None:
        self.app = app
        self.faults = faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] in ("/_control", "/_requests"):
            await (await self._control(Request(scope, receive)))(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _control(self, request: Request) -> Response:
        try:
            if (request.method, request.url.path) == ("POST", "/_control"):
                self.faults.pending.append(Fault(**await request.json()))
        except (TypeError, ValueError, re.error) as error:
            return JSONResponse({"error": str(error)}, 400)
        if (request.method, request.url.path) == ("DELETE", "/_control"):
            self.faults.pending.clear()
        if (request.method, request.url.path) == ("DELETE", "/_requests"):
            self.faults.requests.clear()
        return JSONResponse(self.faults.requests if request.url.path == "/_requests" else {})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        query = f"?{scope['query_string'].decode()}" if scope["query_string"] else ""
        target = scope["raw_path"].decode() + query
        record: dict[str, Any] = {
            "method": scope["method"],
            "path": target,
            "host": headers.get("host", ""),
            "range": headers.get("range"),
            "authorized": "authorization" in headers,
            "status": None,
            "received": 0,
            "sent": 0,
        }
        self.faults.requests.append(record)
        raw_send, send = send, _counting(send, record)  # innermost, so that it counts what really leaves
        for fault in self.faults.take(f"{scope['method']} {target}", *ACTIONS[:-1]):
            if fault.action == "delay":
                await asyncio.sleep(fault.seconds)
            elif fault.action == "status":
                refusal = JSONResponse({"error": "this fault was asked for"}, fault.status, fault.headers)
                await refusal(scope, receive, send)
                return
            elif fault.action == "cut_request":
                receive = _cut_request(receive, fault.after)
            else:
                send = (_cut_response if fault.action == "cut_response" else _flip)(send, fault.after)
        try:
            await self.app(scope, _counting_receive(receive, record), send)
        except ClientDisconnect:
            return
        except ConnectionCutError:
            if record["status"] is None:
                # A body shorter than announced makes the server close the connection.
                await raw_send({"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"1")]})


def _counting(send: Send, record: dict[str, Any]) -> Send:
    async def counting(message: Message) -> None:
        if message["type"] == "http.response.start":
            record["status"] = message["status"]
        await send(message)
        record["sent"] += len(message.get("body", b""))

    return counting


def _counting_receive(receive: Receive, record: dict[str, Any]) -> Receive:
    async def counting() -> Message:
        message = await receive()
        record["received"] += len(message.get("body", b""))
        return message

    return counting


def _cut_request(receive: Receive, after: int) -> Receive:
    left = after

    async def cutting() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0 or (left == 0 and not message.get("more_body")):
            raise ConnectionCutError
        return message

    return cutting


def _cut_response(send: Send, after: int) -> Send:
    left = after

    async def cutting(message: Message) -> None:
        nonlocal left
        body = message.get("body", b"")
        if message["type"] == "http.response.body" and len(body) >= left:
            await send({**message, "body": body[:left], "more_body": True})
            raise ConnectionCutError
        left -= len(body)
        await send(message)

    return cutting


def _flip(send: Send, offset: int) -> Send:
    left = offset

    async def flipping(message: Message) -> None:
        nonlocal left
        body = message.get("body", b"")
        if 0 <= left < len(body):
            message = {**message, "body": body[:left] + bytes([body[left] ^ 0xFF]) + body[left + 1 :]}
        left -= len(body)
        await send(message)

    return flipping
