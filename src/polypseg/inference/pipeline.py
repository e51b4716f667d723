"""Stages of a pipeline, each in a thread of its own, joined by bounded queues that keep the order."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
_POLL = 0.1
"""Seconds after which a full queue is looked at again, to notice that nobody reads it any more."""


class _End:
    """The last entry of a queue: nothing more comes, or this error came."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


def in_background(items: Iterable[Item], *, depth: int = 4) -> Generator[Item, None, None]:
    """The same items in the same order, produced by a thread that runs at most ``depth`` items ahead.

    An error of ``items`` is raised here after all items before it, so what was produced is never lost. Closing the
    iterator (or leaving it by an error) stops the thread and closes ``items``.
    """
    entries: queue.Queue[Item | _End] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: Item | _End) -> bool:
        while not stopped.is_set():
            try:
                entries.put(entry, timeout=_POLL)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        iterator = iter(items)
        try:
            end = _End()
            try:
                for item in iterator:
                    if not put(item):
                        return
            except BaseException as error:  # whatever it is, the reader raises it
                end = _End(error)
            put(end)
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            entry = entries.get()
            if not isinstance(entry, _End):
                yield entry
            elif entry.error is not None:
                raise entry.error
            else:
                return
    finally:
        stopped.set()
        thread.join()
