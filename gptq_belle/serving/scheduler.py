"""The thread that runs the engine, and the queues that deliver its tokens to the tasks of the server."""

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from gptq_belle.engine.batching import Engine
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.engine.slots import Event, Request
from gptq_belle.engine.token_constraint import TokenConstraint
from gptq_belle.errors import GptqBelleError
from gptq_belle.serving.api_errors import ApiError, engine_stopped, logged
from gptq_belle.serving.engine_watch import EngineWatch
from gptq_belle.serving.metrics import Metrics
from gptq_belle.serving.queued_request import (
    DEFAULT_TIMEOUTS,
    Item,
    ItemQueue,
    QueuedRequest,
    Timeouts,
    put_items,
)

LOGGER = logging.getLogger("gptq_belle")
RETRY_AFTER = "1"  # seconds; a slot becomes free when the shortest answer ends


class Scheduler:
    """Submits prompts to the engine when slots become free, and delivers tokens.

    A step that raises an exception fails the running requests only, if the device still works. Any other exception ends
    the thread: all requests and calls get an error, later ones are refused, and `on_failure` is called. A step that
    takes too long has the same consequence. Every failure is logged once and counted.

    Args:
        engine: the engine; used by this object's thread only.
        queue_limit: maximum number of answers that wait for a slot; more are rejected with status 429.
        timeouts: limits of time.
    Attributes:
        failure: the exception that ended the thread, if any.
        on_failure: called in a thread with that exception, after the clients were informed.
    """

    failure: BaseException | None = None
    on_failure: Callable[[BaseException], None] | None = None

    def __init__(self, engine: Engine, queue_limit: int, metrics: Metrics,
                 timeouts: Timeouts = DEFAULT_TIMEOUTS) -> None:
        self.engine, self.queue_limit, self.metrics, self.timeouts = engine, queue_limit, metrics, timeouts
        self._changed = threading.Condition()
        self._waiting: deque[QueuedRequest] = deque()
        self._cancelled: list[QueuedRequest] = []
        self._calls: deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = deque()
        self._running: dict[Request, QueuedRequest] = {}  # used by the thread only
        self._open: set[QueuedRequest] = set()  # submitted, and neither ended nor cancelled
        self._loop: asyncio.AbstractEventLoop | None = None  # event loop of the server
        self._closing = False
        self._watch = EngineWatch(timeouts.engine, self._stop)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompts: Sequence[tuple[Sequence[int], SamplingParams]],
               constraint: TokenConstraint | None = None) -> list[QueuedRequest]:
        """Queue answers, all of them or none; called in the event loop of the server. They share the queue `arrived`.

        Args:
            prompts: token ids and sampling parameters of each answer.
            constraint: the grammar of all answers, if any.
        Raises:
            ApiError: 429 if the queue is full, 503 if the server is stopping or the thread has ended.
        """
        with self._changed:
            if self.failure is not None:
                raise engine_stopped()
            if self._closing:
                raise ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})
            free = self.engine.slots - len(self._running)
            if len(self._waiting) + len(prompts) > self.queue_limit + max(free, 0):
                self.metrics.requests.labels("refused").inc(len(prompts))
                waiting = len(self._waiting)
                raise ApiError(429, f"The queue is full: {waiting} requests are waiting (limit {self.queue_limit}).",
                               code="queue_full", headers={"Retry-After": RETRY_AFTER})
            self._loop, arrived = asyncio.get_running_loop(), ItemQueue()
            answers = [QueuedRequest(self, index, ids, params, arrived) for index, (ids, params) in enumerate(prompts)]
            for answer in answers:
                answer.constraint = None if constraint is None else constraint.copy()
            self._waiting.extend(answers)
            self._open.update(answers)
            self._changed.notify()
        return answers

    def cancel(self, answer: QueuedRequest) -> None:
        """See `QueuedRequest.cancel`."""
        with self._changed:
            self._cancelled.append(answer)
            self._changed.notify()

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function that uses the model in the engine's thread, between two steps.

        Raises:
            GptqBelleError: from the function; any other error of it is logged, and raised as ApiError 500.
            ApiError: 503 if the thread has ended.
        """
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._changed:
            if self.failure is not None:
                raise engine_stopped()
            self._calls.append((function, future))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def close(self, timeout: float | None = None) -> bool:
        """Reject new requests, finish the accepted ones and stop; False if that takes longer than `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.failure is None:  # a thread that hangs cannot be waited for
            self._thread.join(timeout)
        return self.failure is not None or not self._thread.is_alive()

    @property
    def capacity(self) -> int:
        """Number of answers that can run and wait together."""
        return self.engine.slots + self.queue_limit

    @property
    def running(self) -> int:
        """Number of answers that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of answers that wait for a slot."""
        return len(self._waiting)

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # SystemExit too: without this thread no client would get an answer
            self._stop(error)
        finally:
            self._watch.close()

    def _serve(self) -> None:
        while self.failure is None and self._prepare():
            if self._calls:  # one between two steps
                self._answer_call(*self._calls[0])
                self._calls.popleft()  # only now, so that `_stop` finds a call that ended the thread
            if not self._running:
                continue
            try:
                events = self.engine.step()
            except Exception as error:  # running requests are lost; the server continues if the device works
                self._fail(error)
                self.engine.check_device()
                continue
            if self.failure is None:  # the step was not given up
                self._deliver(events)

    def _answer_call(self, function: Callable[[], Any], future: "concurrent.futures.Future[Any]") -> None:
        if not future.set_running_or_notify_cancel():  # the client has left
            return
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(self._logged(error))

    def _prepare(self) -> bool:
        """Wait for work, remove cancelled answers and fill free slots. False if the scheduler has to stop."""
        with self._changed:
            while not (self._waiting or self._running or self._cancelled or self._calls):
                if self._closing:
                    return False
                self._set_gauges()
                self.metrics.speed.set(0)
                self._watch.end()
                self._changed.wait()
            self._watch.begin()
            cancelled, self._cancelled = self._cancelled, []
            for answer in cancelled:
                if answer in self._waiting:
                    self._waiting.remove(answer)
            new = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._free(cancelled)))]
        self._open.difference_update(cancelled)
        for answer in cancelled:
            if answer.request is not None and self._running.pop(answer.request, None) is not None:
                self.engine.cancel(answer.request)
                self.metrics.requests.labels("cancelled").inc()
        for answer in new:
            self._start(answer)
        self._set_gauges()
        return True

    def _free(self, cancelled: Sequence[QueuedRequest]) -> int:
        stopping = sum(1 for answer in set(cancelled) if answer.request in self._running)
        return self.engine.slots - len(self._running) + stopping

    def _start(self, answer: QueuedRequest) -> None:
        try:
            answer.request = self.engine.submit(answer.ids, answer.params, answer.constraint)
        except Exception as error:
            self.metrics.requests.labels("failed").inc()
            self._send([(answer, error if isinstance(error, GptqBelleError) else self._logged(error))])
        else:
            self._running[answer.request] = answer
            answer.queued = time.perf_counter() - answer.start
            self.metrics.queue.observe(answer.queued)
            self.metrics.prompt_tokens.inc(len(answer.ids))

    def _deliver(self, events: Sequence[Event]) -> None:
        items: list[tuple[QueuedRequest, Item]] = []
        now = time.perf_counter()
        for event in events:
            answer = self._running[event.request]
            if event.token is not None:
                self.metrics.count_token(answer, now)
                items.append((answer, event))
            if event.finished is not None:
                del self._running[event.request]
                self.metrics.requests.labels("failed" if event.error else event.finished).inc()
                self.metrics.latency.observe(now - answer.start)
                items.append((answer, event.finished if event.error is None else self._logged(event.error)))
        self.metrics.count_tokens(sum(event.token is not None for event in events))
        self._send(items)
        if any(event.error is not None for event in events):
            self.engine.check_device()

    def _fail(self, error: Exception) -> None:
        for request in self._running:
            self.engine.cancel(request)
        response = self._logged(error)
        answers = list(self._running.values())
        self._running.clear()
        self.metrics.requests.labels("failed").inc(len(answers))
        self._send([(answer, response) for answer in answers])

    def _logged(self, error: Exception) -> Exception:
        """Log and count an error of the engine; returns that for the clients that it concerns."""
        self.metrics.failures.inc()
        if isinstance(error, GptqBelleError):  # a fault of the model, such as logits that are not finite
            LOGGER.warning("A request failed: %s.", error.cause)
            return error
        return logged("The engine failed. The requests that it was running end with an error.", error)

    def _stop(self, error: BaseException) -> None:
        """Inform everyone who waits for the thread that it ends, and refuse what comes later."""
        with self._changed:
            if self.failure is not None:
                return
            self.failure = error
            answers, calls = list(self._open), list(self._calls)
            for waiting in (self._open, self._waiting, self._running, self._calls):
                waiting.clear()
        LOGGER.critical("The engine stopped because of an error. No more requests are accepted.", exc_info=error)
        self.metrics.stop(len(answers))
        if answers:
            self._send([(answer, engine_stopped()) for answer in answers])
        for _, future in calls:
            with suppress(concurrent.futures.InvalidStateError):  # the client has left
                future.set_exception(engine_stopped())
        if self.on_failure is not None:
            self.on_failure(error)

    def _send(self, items: Sequence[tuple[QueuedRequest, Item]]) -> None:
        """Deliver all items of a step in one call: waking the event loop costs as much as sending a token."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(put_items, items)
        except RuntimeError:  # the event loop is closed, so nobody waits
            for answer, _ in items:
                answer.cancel()
        else:
            self._open.difference_update(answer for answer, item in items if not isinstance(item, Event))

    def _set_gauges(self) -> None:
        self.metrics.set_gauges(waiting=len(self._waiting), running=len(self._running), cache=self.engine.used)
