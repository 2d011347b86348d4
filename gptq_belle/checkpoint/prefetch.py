"""Prefetch: read the next tensors of a checkpoint in a thread while the current ones are in use."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from torch import Tensor

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.kernels.huge_pages import MemoryPool

T = TypeVar("T")


def prefetch(calls: Iterable[Callable[[], T]], count: int = 1) -> Generator[T]:
    """Yield the results of calls in order, while a thread runs up to `count` calls ahead.

    Reading in a thread is used because `posix_fadvise` made nothing faster on the virtual disk where this was measured.
    Results are not referenced after they have been yielded.
    """
    pool, waiting = ThreadPoolExecutor(1, "prefetch"), list[Future[T]]()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > count:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        pool.shutdown(cancel_futures=True)


class BlockPrefetch:
    """Reads the tensors of blocks in a thread, stage by stage in the order of use.

    At most one block is in memory, so loading needs no more memory than the loaded model.

    Args:
        prefix: prefix of the block names: prefix.0, prefix.1, ...
    """

    def __init__(self, reader: CheckpointReader, prefix: str, count: int) -> None:
        self._reader, self._memory = reader, MemoryPool()
        stages = self._names_by_stage(prefix, count)
        self._pending = {name for names in stages for name in names}
        self._stages = prefetch(self._read_calls(stages), len(reader.arch.stages) - 1)
        self._ready: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor | None:
        """Return a prefetched tensor; None if it does not belong to a block or was taken before.

        Raises:
            InputError: see `CheckpointReader.tensor`.
        """
        while name in self._pending:
            self._ready |= next(self._stages)
            self._pending -= self._ready.keys()
        return self._ready.pop(name, None)

    def close(self) -> None:
        """Stop reading."""
        self._stages.close()
        self._pending.clear()
        self._ready.clear()

    def _names_by_stage(self, prefix: str, count: int) -> list[list[str]]:
        """Tensor names by block and stage; tensors that belong to no linear are in the first stage of the block."""
        depth, linears = prefix.count(".") + 2, self._reader.arch.stages
        stages: list[list[str]] = [[] for _ in range(count * len(linears))]
        numbers = {f"{prefix}.{index}": index for index in range(count)}
        for name in self._reader:
            parts = name.split(".")
            if (number := numbers.get(".".join(parts[:depth]))) is not None:
                linear = ".".join(parts[depth:-1])
                stage = next((index for index, names in enumerate(linears) if linear in names), 0)
                stages[number * len(linears) + stage].append(name)
        return stages

    def _read_calls(self, stages: Sequence[Sequence[str]]) -> Iterator[Callable[[], dict[str, Tensor]]]:
        for names in stages:
            yield partial(self._read, names)
        self._memory.stop_pooling()

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._reader.tensor(name, self._memory) for name in names}
