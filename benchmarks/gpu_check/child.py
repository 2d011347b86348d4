"""Child processes that run functions one after another, each with a time limit, and are replaced when they die.

A kernel with an illegal memory access takes the CUDA context of its process with it, and a compiler may hang or crash.
In a child, that costs one call.
"""

import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

SPAWN = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
Call = Callable[[], Any]  # can be pickled, as its result


class CallFailed(Exception):
    """A call raised, ended its process, or exceeded its time limit."""


class Child:
    """A process that runs calls; started by the first call, and again after a failure that it may not survive.

    Args:
        prepare: run first in every new process.
    """

    def __init__(self, prepare: Call) -> None:
        self._prepare = prepare
        self._process: Any = None
        self._connection: Any = None

    def call(self, function: Call, limit: float) -> Any:
        """The result of a function in the child.

        Args:
            limit: seconds, including the start of the process.
        Raises:
            CallFailed: with the reason in one line.
        """
        if self._process is None or not self._process.is_alive():
            self.stop()
            self._connection, theirs = SPAWN.Pipe()
            self._process = SPAWN.Process(target=_serve, args=(theirs, self._prepare))
            self._process.start()
            theirs.close()
        try:
            self._connection.send(function)
            if not self._connection.poll(max(limit, 0.0)):
                self.stop()
                raise CallFailed(f"not finished within {limit:.0f} s")
            succeeded, result, usable = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            code = self._process.exitcode
            self.stop()
            raise CallFailed(f"its process ended with code {code}") from error
        if not usable:
            self.stop()
        if not succeeded:
            raise CallFailed(result)
        return result

    def stop(self) -> None:
        """End the process, and those that it started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _serve(connection: Connection, prepare: Call) -> None:
    os.setpgid(0, 0)
    prepare()
    while True:
        try:
            function = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, function(), True)
        except Exception as error:  # every failure is reported to the parent
            traceback.print_exc()
            message = str(error).strip().splitlines()
            answer = (False, f"{type(error).__name__}: {message[0] if message else ''}"[:500], _device_is_usable())
        connection.send(answer)


def _device_is_usable() -> bool:
    """Whether CUDA still works in this process after an exception."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:  # the error of an earlier kernel, which is repeated by every call from now on
        return False
    return True


@contextmanager
def child(prepare: Call) -> Iterator[Child]:
    """A child that is stopped at the end."""
    one = Child(prepare)
    try:
        yield one
    finally:
        one.stop()


def run_all(children: Sequence[Child], calls: Mapping[Any, Call], end: float,
            limit: float = 120.0) -> dict[Any, Any]:
    """Run calls in several children at a time, in order.

    Args:
        end: no call is started after this time (`time.monotonic`), and running ones are ended.
        limit: seconds of one call.
    Returns:
        Results by the key of the call; a CallFailed where one failed, and nothing for those that were not started.
    """
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for key in calls:
        waiting.put(key)
    results: dict[Any, Any] = {}

    def work(one: Child) -> None:
        with suppress(queue.Empty):
            while (remaining := end - time.monotonic()) > 0:
                key = waiting.get_nowait()
                try:
                    results[key] = one.call(calls[key], min(limit, remaining))
                except CallFailed as error:
                    results[key] = error

    threads = [threading.Thread(target=work, args=(one,)) for one in children[: len(calls)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
