"""Scheduler, tested with an engine without a model whose steps the tests release one by one."""

import ast
import asyncio
import inspect
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress

import pytest

from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.engine.slots import Event, Request
from gptq_belle.errors import UsageError
from gptq_belle.serving import scheduler as scheduler_module
from gptq_belle.serving.api_errors import ApiError
from gptq_belle.serving.engine_watch import EngineHangs
from gptq_belle.serving.metrics import Metrics
from gptq_belle.serving.queued_request import Timeouts
from gptq_belle.serving.scheduler import Scheduler

LIMIT = 20.0  # seconds until a test that waits for something fails
REFUSED_ID = -1  # the fake engine refuses a prompt that holds it
FATAL_ID = -2  # it ends its thread at a prompt that holds it


class FakeEngine:
    """Answers a prompt (first, ...) with the tokens first, first + 1, ...

    Attributes:
        slots: requests that may run at a time; one more is an error of the scheduler.
        running: requests that were submitted and have not ended.
        submitted: prompts, in the order of their submission.
        cancelled: requests, in the order of their cancellation.
        failure: what the next step raises.
        device_failure: what a check of the device raises.
        result: what the next step returns instead of its events.
        threads: those that called this object.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.running: list[Request] = []
        self.submitted: list[list[int]] = []
        self.cancelled: list[Request] = []
        self.failure: BaseException | None = None
        self.device_failure: BaseException | None = None
        self.result: list | None = None
        self.threads: set[threading.Thread] = set()
        self.in_step = threading.Event()
        self._permits = threading.Semaphore(0)

    @property
    def used(self) -> float:
        return len(self.running) / self.slots

    def allow(self, steps: int) -> None:
        self._permits.release(steps)

    def check_device(self):
        if self.device_failure is not None:
            raise self.device_failure

    def submit(self, ids, params, constraint=None):
        self.threads.add(threading.current_thread())
        if REFUSED_ID in ids:
            raise UsageError(f"token id {REFUSED_ID} is not in the vocabulary")
        if FATAL_ID in ids:
            raise SystemExit(3)
        assert len(self.running) < self.slots, "more requests than slots"
        request = Request(list(ids), params, params.max_new_tokens)
        self.running.append(request)
        self.submitted.append(request.ids)
        return request

    def cancel(self, request):
        self.threads.add(threading.current_thread())
        self.running.remove(request)
        self.cancelled.append(request)

    def step(self):
        self.threads.add(threading.current_thread())
        assert self.running, "a step without requests"
        self.in_step.set()
        allowed = self._permits.acquire(timeout=LIMIT)
        self.in_step.clear()
        assert allowed, "the test released too few steps"
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        if self.result is not None:
            return self.result
        return [self._advance(request) for request in list(self.running)]

    def _advance(self, request):
        request.answer.append(request.ids[0] + len(request.answer))
        if len(request.answer) == request.max_new_tokens:
            request.finished = "length"
            self.running.remove(request)
        return Event(request, request.answer[-1], request.finished)


@contextmanager
def scheduling(slots, queue_limit, **timeouts):
    engine, metrics = FakeEngine(slots), Metrics()
    scheduler = Scheduler(engine, queue_limit, metrics, Timeouts(**timeouts))
    try:
        yield scheduler, engine, metrics
    finally:
        engine.allow(1000)
        assert scheduler.close(LIMIT)


def prompt(first, tokens=2):
    return [first], SamplingParams(max_new_tokens=tokens)


async def until(condition):
    async def poll():
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), LIMIT)


async def start(scheduler, engine, *prompts):
    """Submit one request; return its answers once a step of the engine is waiting to be released."""
    answers = scheduler.submit(prompts)
    await until(engine.in_step.is_set)
    return answers


async def items(answer, count):
    """The next items of the request of an answer: (index, token), (index, finish reason) or (index, error)."""
    found = [await asyncio.wait_for(answer.arrived.get(), LIMIT) for _ in range(count)]
    return [(index, item.token if isinstance(item, Event) else item) for index, item in found]


def ended(metrics, outcome):
    return metrics.registry.get_sample_value("gptq_belle_requests_total", {"outcome": outcome}) or 0


def gauge(metrics, name):
    return metrics.registry.get_sample_value(f"gptq_belle_{name}")


def assert_refused(scheduler, prompts):
    before = scheduler.waiting
    with pytest.raises(ApiError) as refused:
        scheduler.submit(prompts)
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert int(refused.value.headers["Retry-After"]) > 0
    assert scheduler.waiting == before  # none of them was taken


def test_tokens_arrive_in_order_followed_by_the_finish_reason():
    async def client(scheduler, engine):
        engine.allow(3)
        [answer] = scheduler.submit([prompt(10, tokens=3)])
        assert await items(answer, 4) == [(0, 10), (0, 11), (0, 12), (0, "length")]
        await until(lambda: scheduler.running == 0)

    with scheduling(1, 0) as (scheduler, engine, metrics):
        asyncio.run(client(scheduler, engine))
        assert ended(metrics, "length") == 1
        assert gauge(metrics, "generated_tokens_total") == 3
        assert gauge(metrics, "prompt_tokens_total") == 1
        assert gauge(metrics, "time_to_first_token_seconds_count") == 1


def test_prompts_of_one_request_share_a_queue_and_are_numbered():
    async def client(scheduler, engine):
        engine.allow(2)
        answers = scheduler.submit([prompt(10, 1), prompt(20, 1), prompt(30, 1)])
        assert [answer.index for answer in answers] == [0, 1, 2]
        assert len({id(answer.arrived) for answer in answers}) == 1
        assert await items(answers[0], 6) == [(0, 10), (0, "length"), (1, 20), (1, "length"), (2, 30), (2, "length")]

    with scheduling(2, 1) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_queue_accepts_its_limit_while_all_slots_are_busy():
    async def client(scheduler, engine, metrics):
        await start(scheduler, engine, prompt(10), prompt(20))
        for first in (30, 40, 50):
            scheduler.submit([prompt(first)])
        assert (scheduler.running, scheduler.waiting) == (2, 3)
        assert_refused(scheduler, [prompt(60)])
        assert ended(metrics, "refused") == 1

    with scheduling(2, 3) as (scheduler, engine, metrics):
        asyncio.run(client(scheduler, engine, metrics))


def test_prompts_of_one_request_are_accepted_all_or_none():
    async def client(scheduler, engine, metrics):
        await start(scheduler, engine, prompt(10))
        scheduler.submit([prompt(20)])
        assert_refused(scheduler, [prompt(30), prompt(40), prompt(50)])
        assert ended(metrics, "refused") == 3
        scheduler.submit([prompt(60), prompt(70)])
        assert_refused(scheduler, [prompt(80)])
        engine.allow(8)
        await until(lambda: len(engine.submitted) == 4)
        assert engine.submitted == [[10], [20], [60], [70]]

    with scheduling(1, 3) as (scheduler, engine, metrics):
        asyncio.run(client(scheduler, engine, metrics))


@pytest.mark.parametrize(("slots", "queue_limit"), [(1, 0), (2, 3)])
def test_free_slots_do_not_count_against_the_queue_limit(slots, queue_limit):
    async def client(scheduler, engine):
        most = slots + queue_limit
        assert_refused(scheduler, [prompt(10 * i) for i in range(most + 1)])
        await start(scheduler, engine, *(prompt(10 * i) for i in range(most)))
        assert (scheduler.running, scheduler.waiting) == (slots, queue_limit)
        assert_refused(scheduler, [prompt(0)])

    with scheduling(slots, queue_limit) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_place_in_the_queue_is_free_again_when_a_waiting_request_starts():
    async def client(scheduler, engine):
        await start(scheduler, engine, prompt(10, tokens=1))
        scheduler.submit([prompt(20, tokens=1)])
        assert_refused(scheduler, [prompt(30)])
        engine.allow(1)
        await until(lambda: engine.submitted[-1] == [20] and engine.in_step.is_set())
        scheduler.submit([prompt(30)])
        assert scheduler.waiting == 1

    with scheduling(1, 1) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_requests_start_in_the_order_of_their_arrival():
    async def client(scheduler, engine):
        answers = [await start(scheduler, engine, prompt(10, 1))]
        answers += [scheduler.submit([prompt(first, 1)]) for first in (40, 20, 30)]
        engine.allow(4)
        for [answer] in answers:
            await items(answer, 2)
        assert engine.submitted == [[10], [40], [20], [30]]

    with scheduling(1, 3) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_waiting_request_that_is_cancelled_never_starts():
    async def client(scheduler, engine):
        [first] = await start(scheduler, engine, prompt(10))
        [cancelled], [third] = scheduler.submit([prompt(20)]), scheduler.submit([prompt(30)])
        cancelled.cancel()
        engine.allow(4)
        assert await items(first, 3) == [(0, 10), (0, 11), (0, "length")]
        assert await items(third, 3) == [(0, 30), (0, 31), (0, "length")]
        assert engine.submitted == [[10], [30]]
        assert cancelled.arrived.empty()
        assert engine.cancelled == []

    with scheduling(1, 2) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_cancelling_a_waiting_request_frees_its_place_in_the_queue():
    async def client(scheduler, engine):
        await start(scheduler, engine, prompt(10, tokens=3))
        [waiting] = scheduler.submit([prompt(20)])
        waiting.cancel()
        engine.allow(1)
        await until(lambda: scheduler.waiting == 0)
        scheduler.submit([prompt(30)])

    with scheduling(1, 1) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_cancelling_during_a_stream_frees_the_slot_for_the_next_request():
    async def client(scheduler, engine, metrics):
        [first] = await start(scheduler, engine, prompt(10, tokens=100))
        [second] = scheduler.submit([prompt(20, tokens=1)])
        engine.allow(1)
        assert await items(first, 1) == [(0, 10)]
        await until(engine.in_step.is_set)
        first.cancel()
        engine.allow(2)  # the step that was running, and one of the next request
        assert await items(second, 2) == [(0, 20), (0, "length")]
        assert [request.ids for request in engine.cancelled] == [[10]]
        assert await items(first, 1) == [(0, 11)]  # of the step that was running
        assert first.arrived.empty()
        assert ended(metrics, "cancelled") == 1
        assert ended(metrics, "length") == 1

    with scheduling(1, 1) as (scheduler, engine, metrics):
        asyncio.run(client(scheduler, engine, metrics))


def test_slot_of_a_cancelled_request_is_used_in_the_very_next_step():
    async def client(scheduler, engine):
        first, _ = await start(scheduler, engine, prompt(10, tokens=100), prompt(20, tokens=100))
        scheduler.submit([prompt(30)])
        first.cancel()
        engine.allow(1)
        await until(lambda: engine.cancelled and engine.in_step.is_set())
        assert [request.ids for request in engine.running] == [[20], [30]]

    with scheduling(2, 1) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_cancelling_twice_frees_one_slot_only():
    async def client(scheduler, engine, metrics):
        [first] = await start(scheduler, engine, prompt(10, tokens=100))
        others = [scheduler.submit([prompt(first, tokens=1)])[0] for first in (20, 30)]
        first.cancel()
        first.cancel()
        engine.allow(3)
        assert await items(others[0], 2) == [(0, 20), (0, "length")]
        assert await items(others[1], 2) == [(0, 30), (0, "length")]
        assert ended(metrics, "cancelled") == 1

    with scheduling(1, 2) as (scheduler, engine, metrics):
        asyncio.run(client(scheduler, engine, metrics))


def test_cancelling_a_finished_request_changes_nothing():
    async def client(scheduler, engine, metrics):
        engine.allow(1)
        [finished] = scheduler.submit([prompt(10, tokens=1)])
        await items(finished, 2)
        [other] = await start(scheduler, engine, prompt(20, tokens=2))
        finished.cancel()
        engine.allow(2)
        assert await items(other, 3) == [(0, 20), (0, 21), (0, "length")]
        assert engine.cancelled == []
        assert ended(metrics, "cancelled") == 0

    with scheduling(1, 1) as (scheduler, engine, metrics):
        asyncio.run(client(scheduler, engine, metrics))


def test_step_that_raises_fails_all_running_requests_and_serves_the_waiting_ones(caplog):
    async def client(scheduler, engine, metrics):
        failure = engine.failure = RuntimeError("step failed")
        [first] = await start(scheduler, engine, prompt(10))
        [second] = scheduler.submit([prompt(20)])
        engine.failure = None
        engine.allow(1)
        await items(first, 1)
        await until(lambda: scheduler.running == 2 and engine.in_step.is_set())
        [waiting] = scheduler.submit([prompt(30, tokens=1)])
        engine.failure = failure
        engine.allow(1)
        for answer in (first, second):
            [(index, error)] = await items(answer, 1)
            assert (index, error.status, error.__cause__) == (0, 500, failure)
        [record] = caplog.records  # one, although two clients get the error
        assert record.exc_info[1] is failure
        assert [request.ids for request in engine.cancelled] == [[10], [20]]
        assert ended(metrics, "failed") == 2
        engine.allow(1)
        assert await items(waiting, 2) == [(0, 30), (0, "length")]
        engine.allow(1)
        [later] = scheduler.submit([prompt(40, tokens=1)])
        assert await items(later, 2) == [(0, 40), (0, "length")]
        assert first.arrived.empty()
        assert second.arrived.empty()
        assert ended(metrics, "failed") == 2

    with scheduling(2, 1) as (scheduler, engine, metrics):
        asyncio.run(client(scheduler, engine, metrics))


def test_prompt_that_the_engine_refuses_fails_alone():
    async def client(scheduler, engine, metrics):
        engine.allow(1)
        answers = scheduler.submit([prompt(10, 1), prompt(REFUSED_ID), prompt(30, 1)])
        found = await items(answers[0], 5)
        [(index, error)] = [item for item in found if isinstance(item[1], Exception)]
        assert (index, type(error)) == (1, UsageError)
        assert [item for item in found if item[0] != 1] == [(0, 10), (0, "length"), (2, 30), (2, "length")]
        assert ended(metrics, "failed") == 1
        assert ended(metrics, "length") == 2
        await until(lambda: scheduler.running == 0)

    with scheduling(3, 0) as (scheduler, engine, metrics):
        asyncio.run(client(scheduler, engine, metrics))


def test_call_runs_in_the_thread_of_the_engine():
    async def client(scheduler, engine):
        thread = await asyncio.wait_for(scheduler.call(threading.current_thread), LIMIT)
        assert thread is not threading.current_thread()
        engine.allow(1)
        [answer] = scheduler.submit([prompt(10, 1)])
        await items(answer, 2)
        assert engine.threads == {thread}

    with scheduling(1, 0) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_call_runs_between_two_steps_of_a_request():
    async def client(scheduler, engine):
        [answer] = await start(scheduler, engine, prompt(10))
        call = asyncio.ensure_future(scheduler.call(lambda: list(engine.running[0].answer)))
        await asyncio.sleep(0.05)
        assert not call.done()  # a step is running
        engine.allow(1)
        assert await asyncio.wait_for(call, LIMIT) == [10]
        engine.allow(1)
        assert await items(answer, 3) == [(0, 10), (0, 11), (0, "length")]

    with scheduling(1, 0) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_error_of_a_call_is_raised_in_its_caller():
    async def client(scheduler, engine):
        with pytest.raises(ApiError) as raised:
            await asyncio.wait_for(scheduler.call(lambda: 1 // 0), LIMIT)
        assert (raised.value.status, type(raised.value.__cause__)) == (500, ZeroDivisionError)
        assert await asyncio.wait_for(scheduler.call(lambda: 5), LIMIT) == 5

    with scheduling(1, 0) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_call_of_a_cancelled_caller_does_not_stop_the_scheduler():
    async def client(scheduler, engine):
        [answer] = await start(scheduler, engine, prompt(10, 1))
        calls = [asyncio.ensure_future(scheduler.call(lambda: 5)) for _ in range(2)]
        await asyncio.sleep(0)
        calls[0].cancel()
        errors = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        engine.allow(1)
        assert await asyncio.wait_for(calls[1], LIMIT) == 5
        await items(answer, 2)
        assert errors == []

    with scheduling(1, 0) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_close_of_an_idle_scheduler_returns_at_once():
    with scheduling(1, 0) as (scheduler, _, _):
        assert scheduler.close(LIMIT)


def test_close_finishes_running_and_waiting_requests_and_refuses_new_ones():
    async def client(scheduler, engine):
        [running] = await start(scheduler, engine, prompt(10))
        [waiting] = scheduler.submit([prompt(20, tokens=1)])
        assert scheduler.close(0.02) is False
        with pytest.raises(ApiError) as refused:
            scheduler.submit([prompt(30)])
        assert (refused.value.status, refused.value.code) == (503, "stopping")
        assert int(refused.value.headers["Retry-After"]) > 0
        engine.allow(3)
        assert await asyncio.to_thread(scheduler.close, LIMIT)
        assert await items(running, 3) == [(0, 10), (0, 11), (0, "length")]
        assert await items(waiting, 2) == [(0, 20), (0, "length")]

    with scheduling(1, 2) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_requests_of_a_closed_event_loop_are_cancelled_and_the_next_loop_is_served():
    async def leave(scheduler, engine):
        await start(scheduler, engine, prompt(10, tokens=100))

    async def client(scheduler, engine):
        engine.allow(2)
        await until(lambda: engine.cancelled)
        [answer] = scheduler.submit([prompt(20, tokens=1)])
        engine.allow(1)
        assert await items(answer, 2) == [(0, 20), (0, "length")]

    with scheduling(1, 0) as (scheduler, engine, _):
        asyncio.run(leave(scheduler, engine))
        engine.allow(1)  # its token finds the loop closed
        asyncio.run(client(scheduler, engine))


def test_gauges_show_running_and_waiting_requests_and_nothing_when_idle():
    async def client(scheduler, engine, metrics):
        answers = await start(scheduler, engine, prompt(10, 1), prompt(20, 1), prompt(30, 1))
        assert (gauge(metrics, "batch_size"), gauge(metrics, "queue_length")) == (2, 1)
        assert gauge(metrics, "cache_used_ratio") == 1
        engine.allow(2)
        await items(answers[0], 6)
        await until(lambda: gauge(metrics, "batch_size") == 0)
        assert gauge(metrics, "queue_length") == gauge(metrics, "cache_used_ratio") == 0
        assert gauge(metrics, "tokens_per_second") == 0

    with scheduling(2, 1) as (scheduler, engine, metrics):
        asyncio.run(client(scheduler, engine, metrics))


def kill_by_exit(engine):
    engine.failure = SystemExit(3)


def kill_by_interrupt(engine):
    engine.failure = KeyboardInterrupt()


def kill_by_garbage(engine):
    engine.result = [object()]


def kill_by_an_event_of_an_unknown_request(engine):
    known = engine.running[0]
    engine.result = [Event(known, None, "stop"), Event(Request([1], SamplingParams(), 1), 5, None)]


@pytest.mark.parametrize("kill", [kill_by_exit, kill_by_interrupt, kill_by_garbage,
                                  kill_by_an_event_of_an_unknown_request])
def test_running_waiting_and_new_requests_and_calls_get_the_error_that_ends_the_thread(kill, caplog):
    async def client(scheduler, engine, metrics):
        told = threading.Event()
        scheduler.on_failure = lambda error: told.set()
        running = await start(scheduler, engine, prompt(10), prompt(20))
        [waiting] = scheduler.submit([prompt(30)])
        call = asyncio.ensure_future(scheduler.call(lambda: 5))
        await asyncio.sleep(0)
        kill(engine)
        engine.allow(1)
        found = await items(running[0], 2) + await items(waiting, 1)
        assert [index for index, _ in found] in ([0, 1, 0], [1, 0, 0])
        assert {error.status for _, error in found} == {503}
        with pytest.raises(ApiError) as refused:
            await asyncio.wait_for(call, LIMIT)
        assert refused.value.status == 503
        with pytest.raises(ApiError) as refused:
            scheduler.submit([prompt(40)])
        assert refused.value.status == 503
        with pytest.raises(ApiError):
            await asyncio.wait_for(scheduler.call(lambda: 5), LIMIT)
        assert await asyncio.to_thread(told.wait, LIMIT)
        assert (scheduler.running, scheduler.waiting) == (0, 0)
        assert ended(metrics, "failed") == 3
        [record] = caplog.records
        assert record.exc_info[1] is scheduler.failure

    with scheduling(2, 1) as (scheduler, engine, metrics):
        asyncio.run(client(scheduler, engine, metrics))


def test_all_requests_get_the_error_if_the_thread_ends_while_they_start():
    async def client(scheduler):
        answers = scheduler.submit([prompt(10), prompt(FATAL_ID), prompt(30)])
        found = await items(answers[0], 3)
        assert sorted(index for index, _ in found) == [0, 1, 2]
        assert all(isinstance(error, ApiError) for _, error in found)

    with scheduling(3, 0) as (scheduler, _, _):
        asyncio.run(client(scheduler))


def test_call_that_ends_the_thread_and_later_calls_get_the_error():
    async def client(scheduler, engine):
        await start(scheduler, engine, prompt(10))
        calls = [asyncio.ensure_future(scheduler.call(function)) for function in (lambda: 4, sys.exit, lambda: 5)]
        await asyncio.sleep(0)
        engine.allow(2)  # one call between two steps
        found = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), LIMIT)
        assert found[0] == 4
        assert [error.status for error in found[1:]] == [503, 503]

    with scheduling(1, 0) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_finished_request_does_not_get_a_later_error_of_the_thread():
    async def client(scheduler, engine):
        engine.allow(1)
        [ended] = scheduler.submit([prompt(10, 1)])
        await items(ended, 2)
        [cancelled, last] = await start(scheduler, engine, prompt(20), prompt(30))
        cancelled.cancel()
        engine.allow(1)
        await items(last, 2)  # the tokens of the step that was running
        await until(engine.in_step.is_set)
        kill_by_exit(engine)
        engine.allow(1)
        [(index, error)] = await items(last, 1)
        assert (index, error.status) == (1, 503)
        assert ended.arrived.empty()
        assert last.arrived.empty()

    with scheduling(2, 0) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_step_on_a_broken_device_ends_the_thread(caplog):
    async def client(scheduler, engine):
        [answer] = await start(scheduler, engine, prompt(10))
        engine.failure, engine.device_failure = RuntimeError("step failed"), RuntimeError("device lost")
        engine.allow(1)
        await items(answer, 1)
        await until(lambda: scheduler.failure is not None)
        assert [record.exc_info[1].args[0] for record in caplog.records] == ["step failed", "device lost"]

    with scheduling(1, 0) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_request_that_fails_alone_is_logged_and_the_others_go_on(caplog):
    async def client(scheduler, engine, metrics):
        first, second = await start(scheduler, engine, prompt(10), prompt(20, tokens=1))
        failure = RuntimeError("one prompt")
        engine.result = [Event(engine.running.pop(0), None, "error", error=failure)]
        engine.allow(1)
        [(index, error)] = await items(first, 1)
        assert (index, error.status, error.__cause__) == (0, 500, failure)
        engine.result = None
        engine.allow(1)
        assert await items(second, 2) == [(1, 20), (1, "length")]
        assert [record.exc_info[1] for record in caplog.records] == [failure]
        assert gauge(metrics, "engine_failures_total") == 1

    with scheduling(2, 0) as (scheduler, engine, metrics):
        asyncio.run(client(scheduler, engine, metrics))


def test_step_that_hangs_ends_the_server_and_the_log_has_its_stack(caplog):
    async def client(scheduler, engine):
        told = []
        scheduler.on_failure = told.append
        [running] = await start(scheduler, engine, prompt(10))
        [waiting] = scheduler.submit([prompt(20)])
        for answer in (running, waiting):
            [(_, error)] = await items(answer, 1)
            assert error.status == 503
        await until(lambda: told == [scheduler.failure])
        assert isinstance(scheduler.failure, EngineHangs)
        [record] = caplog.records
        assert "in step" in "".join(traceback.format_exception(record.exc_info[1]))
        assert scheduler.close(0)  # without waiting for the thread
        engine.allow(1)
        await asyncio.sleep(0.05)
        assert running.arrived.empty()
        assert len(caplog.records) == 1

    with scheduling(1, 1, engine=0.3) as (scheduler, engine, _):
        asyncio.run(client(scheduler, engine))


def test_idle_scheduler_does_not_hang():
    with scheduling(1, 1, engine=0.05) as (scheduler, _, _):
        time.sleep(0.2)
        assert scheduler.failure is None


# ---- a fault at every statement ----

OTHER_THREADS = {"__init__", "submit", "cancel", "call", "close", "capacity", "running", "waiting"}
HANDLERS = {"_run", "_stop"}  # what deals with such faults


def statements():
    """(function, line) of every statement that the thread of the scheduler runs."""
    functions = [*vars(Scheduler).values(), *vars(scheduler_module).values()]
    codes = [each.__code__ for each in functions if inspect.isfunction(each)
             and each.__module__ == scheduler_module.__name__ and each.__name__ not in OTHER_THREADS | HANDLERS]
    return sorted({(code.co_name, line) for code in codes for _, _, line in code.co_lines()
                   if line is not None and line > code.co_firstlineno})


class Fault(Exception):
    """What a statement raises."""


class FaultAt:
    """Raises a Fault the first time that the traced thread reaches a line, once it is armed.

    The line of a `with` is traced at its end, too; a fault there would leave a lock that is held. It is raised at its
    beginning only, in a call that was traced from the start.
    """

    def __init__(self, line):
        self.line, self.armed, self.raised = line, False, None
        self.entered = set()
        source = ast.walk(ast.parse(inspect.getsource(scheduler_module)))
        self.is_with = line in {each.lineno for each in source if isinstance(each, ast.With)}

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename != scheduler_module.__file__:
            return None
        if event == "call" and self.armed:
            self.entered.add(frame)
        usable = frame in self.entered or not self.is_with
        if event == "line" and frame.f_lineno == self.line and self.armed and usable and self.raised is None:
            self.raised = Fault(self.line)
            raise self.raised
        return self


async def all_kinds_of_requests(scheduler, engine):
    """Requests that end, fail, wait and are cancelled, calls, and a step that raises; all have to hear how they end."""
    ended = [scheduler.submit([prompt(10, 1), prompt(REFUSED_ID), prompt(20, 2), prompt(30, 2)])[0]]
    cancelled, failing = scheduler.submit([prompt(40, 3), prompt(50, 3)])
    call = asyncio.ensure_future(scheduler.call(lambda: 5))
    cancelled.cancel()
    expected, heard = 4, 0
    while heard < expected:
        _, item = await asyncio.wait_for(ended[0].arrived.get(), 5)
        heard += not isinstance(item, Event)
    engine.failure = RuntimeError("a step that raises")
    while isinstance((await asyncio.wait_for(failing.arrived.get(), 5))[1], Event):
        pass
    with suppress(ApiError):
        await asyncio.wait_for(call, 5)


def raised_in(record):
    """The exception of a log record, and its causes."""
    error = record.exc_info and record.exc_info[1]
    while error:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(("function", "line"), statements())
def test_fault_at_any_statement_is_reported_logged_and_survived_or_ends_the_server(function, line, caplog):
    async def client(scheduler, engine, metrics):
        told = threading.Event()
        scheduler.on_failure = lambda error: told.set()
        fault.armed = True
        with suppress(ApiError):  # from `submit`, if the thread has ended
            await all_kinds_of_requests(scheduler, engine)
        await until(lambda: scheduler.failure or gauge(metrics, "batch_size") == 0)
        fault.armed = False
        if fault.raised is None:
            assert scheduler.failure is None
            return
        await until(lambda: fault.raised in [error for record in caplog.records for error in raised_in(record)])
        assert gauge(metrics, "engine_failures_total") >= 1
        if scheduler.failure is None:
            engine.failure = None
            [later] = scheduler.submit([prompt(60, 1)])
            assert await items(later, 2) == [(0, 60), (0, "length")]
        else:
            assert await asyncio.to_thread(told.wait, 5)

    fault = FaultAt(line)
    threading.settrace(fault)
    try:
        with scheduling(2, 8) as (scheduler, engine, metrics):
            threading.settrace(None)
            engine.allow(1000)
            asyncio.run(client(scheduler, engine, metrics))
    finally:
        threading.settrace(None)
