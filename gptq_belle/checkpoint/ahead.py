"""Reading ahead: the next piece of a checkpoint comes from the disk while the last one is worked on."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of some calls in order; each is made in a thread beside this one while the result before is used.

    A thread reads in earnest: asking the system to (`posix_fadvise`) shortened nothing on the virtual disk that this
    was measured on. No result is kept here once it is handed out.
    """
    with ThreadPoolExecutor(1, "reading-ahead") as pool:
        waiting: list[Future[T]] = []
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > 1:
                yield waiting.pop(0).result()
        if waiting:
            yield waiting.pop().result()
