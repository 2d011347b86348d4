"""Prefetching: the next tensors of a checkpoint are read while the last ones are in use."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from torch import Tensor

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.kernels.huge_pages import MemoryPool

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


class BlocksAhead:
    """Reads, in a thread, what some blocks hold, by the order of use; while one stage is laid out, next ones arrive.

    As many stages are in memory as a block has, so that loading takes no more than the model does in the end.

    Args:
        reader: the directory.
        prefix: of the blocks' names.
        count: blocks prefix.0 and on.
    """

    def __init__(self, reader: CheckpointReader, prefix: str, count: int) -> None:
        self._reader, self._memory = reader, MemoryPool()
        stages = self._stages(prefix, count)
        self._coming = {name for names in stages for name in names}
        self._arriving = ahead(self._reads(stages), len(reader.arch.stages) - 1)
        self._here: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor | None:
        """A tensor, once; None for one that is of no such block, or that was taken before.

        Raises:
            InputError: as `CheckpointReader.tensor`.
        """
        while name in self._coming:
            self._here |= next(self._arriving)
            self._coming -= self._here.keys()
        return self._here.pop(name, None)

    def close(self) -> None:
        """Read no more."""
        self._arriving.close()
        self._coming.clear()
        self._here.clear()

    def _stages(self, prefix: str, count: int) -> list[list[str]]:
        """Names by stage of block after block; what belongs to no linear comes with a block's first."""
        depth, linears = prefix.count(".") + 2, self._reader.arch.stages
        stages: list[list[str]] = [[] for _ in range(count * len(linears))]
        numbers = {f"{prefix}.{index}": index for index in range(count)}
        for name in self._reader:
            parts = name.split(".")
            if (number := numbers.get(".".join(parts[:depth]))) is not None:
                linear = ".".join(parts[depth:-1])
                stage = next((place for place, names in enumerate(linears) if linear in names), 0)
                stages[number * len(linears) + stage].append(name)
        return stages

    def _reads(self, stages: Sequence[Sequence[str]]) -> Iterator[Callable[[], dict[str, Tensor]]]:
        for names in stages:
            yield partial(self._read, names)
        self._memory.stop_pooling()

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._reader.tensor(name, self._memory) for name in names}
