"""Start the Hub of this repository's tests by hand, for instance to try publishing without an account:

    python -m tests.local_hub --root runs/hub --port 8800

Its first line of output is its address. In the shell of the client:

    export HF_ENDPOINT=http://127.0.0.1:8800 HF_TOKEN=hf_write HF_HOME=$PWD/runs/hub-client
    export HF_HUB_DISABLE_XET=1       # leave out when the Hub was started with --xet
    export HF_HUB_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_UPDATE_CHECK=1 HF_XET_TELEMETRY_ENABLED=0

HF_ENDPOINT is read when huggingface_hub is imported. Tokens: hf_write and hf_read (alice, a member of the
organization polypseg), hf_other (bob). Data stay in --root between runs. For tests and trials on one machine only.
"""

import argparse
import os
import socket
import sys
import threading
from pathlib import Path

import uvicorn

from .access import DEFAULT_TOKENS, Account, Accounts
from .server import build_server


def _token(text: str) -> tuple[str, Account]:
    token, _, account = text.partition("=")
    name, _, role = account.partition(":")
    if not token or not name or role not in ("read", "write"):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form TOKEN=USER:read or TOKEN=USER:write")
    return token, Account(name, role)


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Read the options, say the address, serve."""
    parser = argparse.ArgumentParser(prog="python -m tests.local_hub", description="A Hub for tests and trials.")
    parser.add_argument("--root", type=Path, required=True, help="folder of all data; made if missing")
    parser.add_argument("--port", type=int, default=0, help="0 chooses a free one")
    parser.add_argument("--xet", action="store_true", help="offer Xet, which clients use unless told otherwise")
    parser.add_argument("--token", type=_token, action="append", default=[], metavar="TOKEN=USER:ROLE")
    parser.add_argument("--page-size", type=int, default=100, help="entries of a list in one answer")
    parser.add_argument("--end-with-stdin", action="store_true", help="stop when standard input closes")
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", options.port))
    port = listener.getsockname()[1]
    app = build_server(
        options.root,
        url=f"http://127.0.0.1:{port}",
        # Another host name for the same server: clients must not send their token there.
        cdn_url=f"http://localhost:{port}",
        accounts=Accounts(DEFAULT_TOKENS | dict(options.token)),
        with_xet=options.xet,
        page_size=options.page_size,
    )
    if options.end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    print(f"http://127.0.0.1:{port}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off")).run(sockets=[listener])


if __name__ == "__main__":
    main()
