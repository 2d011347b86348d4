"""Reading ahead: next pieces of a checkpoint come from the disk while the last one is worked on."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(calls: Iterable[Callable[[], T]], count: int = 1) -> Generator[T]:
    """The results of some calls in order; each is made in a thread beside this one while results before are used.

    Args:
        calls: as many as `count` are made before their results are asked for.
        count: 1 or more.
    A thread reads in earnest: asking the system to (`posix_fadvise`) shortened nothing on the virtual disk that this
    was measured on. No result is kept here once it is handed out.
    """
    pool, waiting = ThreadPoolExecutor(1, "reading-ahead"), list[Future[T]]()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > count:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        pool.shutdown(cancel_futures=True)
