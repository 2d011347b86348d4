"""One requested answer on its way between the server's tasks and the engine's thread."""

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.engine.slots import Event, Request
from gptq_belle.engine.token_constraint import TokenConstraint
from gptq_belle.serving.api_errors import ApiError

if TYPE_CHECKING:
    from gptq_belle.serving.scheduler import Scheduler

Item = Event | str | BaseException  # a token, the finish reason ("stop" or "length"), or an error
ItemQueue = asyncio.Queue[tuple[int, Item]]


class Timeouts(NamedTuple):
    """Limits of time in seconds; None for no limit.

    Attributes:
        request: from the submission of a request to the end of its last answer.
        queue: from the submission to the first slot.
        engine: of one step. A longer one ends the server, because nothing can interrupt it.
    """

    request: float | None = None
    queue: float | None = 600.0
    engine: float | None = 600.0


DEFAULT_TIMEOUTS = Timeouts()


class QueuedRequest:
    """One requested answer.

    Attributes:
        index: its number among the answers that were submitted together.
        arrived: queue of all these answers; each item has the index of its answer.
        start: time of submission.
        request: the engine's request once it has a slot; set by the scheduler's thread, as the next two.
        queued, first, last: seconds from the submission to the slot, to the first token and to the latest token.
    """

    def __init__(self, scheduler: "Scheduler", index: int, ids: Sequence[int], params: SamplingParams,
                 arrived: ItemQueue) -> None:
        self._scheduler = scheduler
        self.index, self.ids, self.params, self.arrived = index, list(ids), params, arrived
        self.start = time.perf_counter()
        self.request: Request | None = None
        self.constraint: TokenConstraint | None = None  # the grammar of the answer
        self.queued: float | None = None
        self.first: float | None = None
        self.last = 0.0

    @property
    def reused(self) -> int:
        """Number of prompt tokens taken from the cache; 0 until the request has a slot."""
        return 0 if self.request is None else self.request.reused

    def seconds_left(self, others: Sequence["QueuedRequest"]) -> float | None:
        """Time until the next timeout of the answers that were submitted together, or None without one.

        Raises:
            ApiError: 503 after the timeout of the queue, 504 after that of the request.
        """
        limits, age = self._scheduler.timeouts, time.perf_counter() - self.start
        queue = limits.queue if all(answer.request is None for answer in others) else None
        for limit, status, code in ((queue, 503, "queue_timeout"), (limits.request, 504, "request_timeout")):
            if limit is not None and age >= limit:
                raise ApiError(status, f"The request was not {'started' if limit is queue else 'completed'} within "
                               f"{limit:g} seconds.", code=code, headers={"Retry-After": "5"})
        return min((limit - age for limit in (queue, limits.request) if limit is not None), default=None)

    def cancel(self) -> None:
        """Stop generating; the slot is free after the current step."""
        self._scheduler.cancel(self)


def put_items(items: Sequence[tuple[QueuedRequest, Item]]) -> None:
    """Deliver items to the queues of their answers; called in the event loop."""
    for answer, item in items:
        answer.arrived.put_nowait((answer.index, item))
