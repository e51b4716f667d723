"""Processes of tests, forked from one that has imported the heavy libraries: a second each instead of ten.

``run`` and ``start`` stand for ``subprocess.run`` and ``subprocess.Popen`` of a Python process. The process is one of
its own in all that tests look at: environment, folder, arguments, output, signals, exit code, death. Only the libraries
of LIBRARIES and READING_THE_ENVIRONMENT are there before it starts; what the latter have read of the Hub's address and
the caches' place they read again. A test of what is imported, or of an installed command, needs ``subprocess``.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

LIBRARIES = (
    *("numpy", "scipy.stats", "scipy.ndimage", "scipy.optimize", "scipy.sparse", "pandas", "pyarrow.dataset"),
    *("sklearn.linear_model", "sklearn.metrics", "sklearn.model_selection", "sklearn.pipeline", "matplotlib.pyplot"),
    *("PIL.Image", "PIL.ImageFilter", "cv2", "tifffile", "torch", "torchvision", "torch.utils.tensorboard"),
    *("safetensors.torch", "httpx", "requests", "fsspec", "aiohttp", "jinja2", "markdown_it", "pydantic", "yaml"),
    *("typer", "rich.table", "tqdm.auto", "filelock", "tenacity", "starlette.applications", "starlette.routing"),
    *("uvicorn", "uvicorn.protocols.http.h11_impl", "python_multipart", "multiprocess", "dill"),
)
READING_THE_ENVIRONMENT = ("huggingface_hub", "datasets", "evaluate", "timm", "accelerate", "transformers")
"""Libraries that read the Hub's address and the cache's place when they are imported."""
_LAZY = {
    "transformers": ("transformers.models.auto", "transformers.pipelines", "transformers.modeling_utils"),
    "timm": ("timm.models.resnet", "timm.models.vision_transformer"),
}
SETTINGS = ("huggingface_hub.constants", "datasets.config", "evaluate.config")
"""Modules in which they keep what they have read."""
_OF_THE_HUB = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_", "DISABLE_", "DO_NOT_TRACK")
_LENGTH = struct.Struct("!I")
_STATUS = struct.Struct("!i")


class Process:
    """What ``subprocess.Popen`` offers, of a process that the forking server started."""

    def __init__(self, args: Sequence[str], connection: socket.socket, pid: int, streams: Sequence[IO[str] | None]):
        self.args, self.pid, self.returncode = args, pid, None
        self.stdin, self.stdout, self.stderr = streams
        self._connection = connection

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                answer = self._connection.recv(_STATUS.size)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0) from None
            if len(answer) != _STATUS.size:
                raise RuntimeError("the forking server has died")
            self.returncode = int(_STATUS.unpack(answer)[0])
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        if self.stdin is not None:
            self.stdin.close()
        read: list[str | None] = [None, None]

        def drain(place: int, stream: IO[str]) -> None:
            read[place] = stream.read()

        streams = [(place, stream) for place, stream in enumerate((self.stdout, self.stderr)) if stream is not None]
        threads = [threading.Thread(target=drain, args=pair, daemon=True) for pair in streams]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join(timeout)
        return read[0], read[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def start(
    command: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    stdin: Any = subprocess.DEVNULL,
    stdout: Any = None,
    stderr: Any = None,
    start_new_session: bool = False,
    text: bool = True,
) -> Process:
    """Start ``[sys.executable, "-c" | "-m" | script, ...]``; streams as ``subprocess.Popen`` takes them, as text."""
    assert text, "streams are text"
    python, *arguments = map(str, command)
    assert python == sys.executable, f"not a process of this Python: {python}"
    environment = dict(os.environ if env is None else env)
    ours: list[IO[str] | None] = []
    theirs: list[int] = []
    opened: list[int] = []
    for number, stream in enumerate((stdin, stdout, stderr)):
        ours.append(None)
        if stream is None:
            theirs.append(number)
        elif stream == subprocess.STDOUT:
            theirs.append(theirs[1])
        elif stream == subprocess.DEVNULL:
            theirs.append(os.open(os.devnull, os.O_RDWR))
            opened.append(theirs[-1])
        elif stream == subprocess.PIPE:
            reading, writing = os.pipe()
            mine, other = (writing, reading) if number == 0 else (reading, writing)
            ours[-1] = os.fdopen(mine, "w" if number == 0 else "r", encoding="utf-8")
            theirs.append(other)
            opened.append(other)
        else:
            theirs.append(stream.fileno())
    request = {
        "arguments": arguments,
        "environment": environment,
        "folder": str(cwd or Path.cwd()),
        "session": start_new_session,
    }
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_server())
    body = json.dumps(request).encode()
    socket.send_fds(connection, [_LENGTH.pack(len(body))], theirs)
    connection.sendall(body)
    for descriptor in opened:
        os.close(descriptor)
    answer = connection.recv(_LENGTH.size)
    if len(answer) != _LENGTH.size:
        raise RuntimeError("the forking server has died")
    return Process(list(map(str, command)), connection, _LENGTH.unpack(answer)[0], ours)


def run(
    command: Sequence[object],
    *,
    capture_output: bool = False,
    check: bool = False,
    timeout: float | None = None,
    **options: Any,
) -> "subprocess.CompletedProcess[str]":
    """As ``subprocess.run`` with text; see ``start`` for the options."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(command, **options) as process:
        try:
            output, errors = process.communicate(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    done = subprocess.CompletedProcess(list(map(str, command)), process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def run_together(command: Sequence[object], *, count: int, env: Mapping[str, str], timeout: float = 300) -> None:
    """Run ``count`` processes of one group, with what `accelerate launch` tells each; AssertionError if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    group["LOCAL_WORLD_SIZE"] = str(count)
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    members = [start(command, env={**env, **group, **rank}, stdout=subprocess.DEVNULL) for rank in ranks]
    try:
        assert [member.wait(timeout) for member in members] == [0] * count
    finally:
        for member in members:
            member.kill()


def interrupt() -> None:
    """Do what a SIGINT does to this process, by calling its handler: a test's worker must not depend on who set it.

    Real signals are sent to the scripts, which are processes of their own.
    """
    handler = signal.getsignal(signal.SIGINT)
    assert callable(handler), f"SIGINT would end this process: its handler is {handler}"
    handler(signal.SIGINT, None)


def run_pair(script: str, folder: Path) -> Path:
    """Run a test module as two processes, ``script RANK FOLDER``, that call ``join_pair`` first; the folder."""
    both = [start([sys.executable, script, str(rank), str(folder)]) for rank in (0, 1)]
    assert [process.wait(300) for process in both] == [0, 0]
    return folder


def join_pair(rank: int, folder: Path) -> None:
    """Become one of two processes of torch.distributed on this machine, which meet in a file of the folder."""
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)


@cache
def _server() -> str:
    """The address of the forking server, which is started when first needed and ends with this process."""
    folder = tempfile.mkdtemp(prefix="polypseg-forks-")
    address = f"{folder}/socket"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}  # no thread of a pool is lost in a fork
    server = subprocess.Popen(
        [sys.executable, __file__, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert server.stdin is not None and server.stdout is not None

    def end() -> None:
        with contextlib.suppress(OSError):
            server.stdin.close()
        server.wait()
        with contextlib.suppress(OSError):
            os.rmdir(folder)

    atexit.register(end)
    if server.stdout.readline().strip() != "ready":
        raise RuntimeError(f"the forking server did not start: exit code {server.wait()}")
    return address


# -- in the server -----------------------------------------------------------------------------------------------------


def _import_libraries() -> None:
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name in READING_THE_ENVIRONMENT:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            for part in _LAZY.get(name, ()):
                importlib.import_module(part)


def _of_the_hub(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(_OF_THE_HUB)}


def _read_environment_again() -> None:
    """Give the libraries of the Hub the settings that they would have read when imported now.

    They keep them in the modules of SETTINGS, and copies of single ones elsewhere under the same names.
    """
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] in READING_THE_ENVIRONMENT]
    for settings in [sys.modules[name] for name in SETTINGS if name in sys.modules]:
        before = {key: value for key, value in vars(settings).items() if key.isupper()}
        importlib.reload(settings)
        for module in modules:
            for key in before.keys() & vars(module).keys():
                if type(vars(module)[key]) is type(before[key]) and vars(module)[key] == before[key]:
                    setattr(module, key, vars(settings)[key])
    home = sys.modules["huggingface_hub.constants"].HF_HOME
    for module in modules:
        if module.__name__.startswith("transformers.") and "HF_MODULES_CACHE" in vars(module):
            module.HF_MODULES_CACHE = os.environ.get("HF_MODULES_CACHE", os.path.join(home, "modules"))


def _serve(address: str) -> dict[str, Any] | None:
    """Fork until standard input ends. Returns None then, and in each child what it is asked to run."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    children: dict[int, tuple[int, socket.socket]] = {}  # file descriptor of the child -> pid, whom to tell
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                for pid, _ in children.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                os.unlink(address)
                return None
            if key.fileobj is listener:
                connection, _ = listener.accept()
                request, streams = _receive(connection)
                reading, writing = os.pipe()  # closed once the child has its own session
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    for descriptor, (_, other) in children.items():
                        os.close(descriptor)
                        other.close()
                    listener.close()
                    connection.close()
                    os.close(reading)
                    _become(request, streams)
                    os.close(writing)
                    return request
                os.close(writing)
                os.read(reading, 1)
                for descriptor in (reading, *streams):
                    os.close(descriptor)
                connection.sendall(_LENGTH.pack(pid))
                descriptor = os.pidfd_open(pid)
                children[descriptor] = pid, connection
                selector.register(descriptor, selectors.EVENT_READ)
            else:
                descriptor = key.fd
                selector.unregister(descriptor)
                pid, connection = children.pop(descriptor)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.close(descriptor)
                with contextlib.suppress(OSError), connection:
                    connection.sendall(_STATUS.pack(status))


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    header, streams, _, _ = socket.recv_fds(connection, _LENGTH.size, 3)
    (length,) = _LENGTH.unpack(header)
    body = b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return json.loads(body), list(streams)


def _become(request: Mapping[str, Any], streams: Sequence[int]) -> None:
    """Give a forked process its own streams, environment, folder and session."""
    if request["session"]:
        os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for descriptor in set(streams):
        os.close(descriptor)
    # New objects: the server's remember what its own streams could do, such as seek.
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    before = _of_the_hub(os.environ)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if _of_the_hub(os.environ) != before:
        _read_environment_again()
    import numpy as np

    np.random.seed()


def _carry_out(arguments: Sequence[str]) -> None:
    """What the interpreter does with its arguments."""
    kind, *rest = arguments
    if kind == "-c":
        code, *words = rest
        sys.argv, sys.path[0] = ["-c", *words], ""
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), module.__dict__)
    elif kind == "-m":
        name, *words = rest
        sys.argv, sys.path[0] = [name, *words], os.getcwd()
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = list(arguments), str(Path(kind).resolve().parent)
        sys.path.append(str(Path(__file__).resolve().parent))  # scripts of the tests find the tests' helpers
        runpy.run_path(kind, run_name="__main__")


def _end(arguments: Sequence[str]) -> NoReturn:
    """Carry out and end as the interpreter does, without taking apart a gigabyte of libraries."""
    code = 0
    try:
        _carry_out(arguments)
    except SystemExit as stop:
        if stop.code is not None:
            code = stop.code if isinstance(stop.code, int) else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except Exception as error:
        inner = error.__traceback__
        while inner is not None and inner.tb_frame.f_code.co_filename == __file__:
            inner = inner.tb_next
        traceback.print_exception(type(error), error, inner)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    _import_libraries()
    gc.collect()
    gc.freeze()
    asked = _serve(sys.argv[1])
    if asked is not None:
        _end(asked["arguments"])
