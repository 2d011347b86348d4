"""Prefetch: results in order, concurrent with their use, and not referenced afterwards."""

import gc
import threading
import weakref
from contextlib import closing
from functools import partial

import pytest
import torch
from conftest import packed_checkpoint

from gptq_belle import load
from gptq_belle.checkpoint.prefetch import BlockPrefetch, prefetch
from gptq_belle.checkpoint.reader import CheckpointReader


class Piece:
    def __init__(self, number):
        self.number = number


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_results_come_in_order(calls, count):
    assert [piece.number for piece in prefetch((partial(Piece, i) for i in range(calls)), count)] == list(range(calls))


@pytest.mark.parametrize("count", [1, 3])
def test_next_calls_run_while_a_result_is_used(count):
    started = [threading.Event() for _ in range(6)]
    for number, _ in enumerate(prefetch([event.set for event in started], count)):
        for event in started[: number + 1 + count]:
            assert event.wait(10)
        assert not any(event.is_set() for event in started[number + 1 + count :])


def test_result_is_freed_when_its_consumer_releases_it():
    for piece in prefetch(partial(Piece, i) for i in range(3)):
        seen = weakref.ref(piece)
        del piece
        gc.collect()
        assert seen() is None


def test_error_is_raised_in_order_of_the_calls():
    def fail():
        raise OSError("no more")

    pieces = prefetch([partial(Piece, 0), fail, partial(Piece, 2)])
    assert next(pieces).number == 0
    with pytest.raises(OSError, match="no more"):
        next(pieces)


def test_tensors_of_blocks_come_once_in_any_order(tiny_model, tmp_path):
    reader = CheckpointReader(packed_checkpoint(tiny_model, tmp_path / "packed"))
    names = [name for name in reader if name.startswith(f"{reader.arch.blocks}.1.")]
    with closing(BlockPrefetch(reader, reader.arch.blocks, 2)) as blocks:
        for name in names[::-1]:
            assert torch.equal(blocks.take(name), reader.tensor(name))
            assert blocks.take(name) is None
        assert blocks.take(f"{reader.arch.blocks}.2.{reader.arch.linears[0]}.qweight") is None
        assert blocks.take("lm_head.weight") is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_skipped_blocks_are_not_read(tiny_model):
    reader = CheckpointReader(tiny_model)
    name = f"{reader.arch.blocks}.1.{reader.arch.linears[-1]}.weight"
    with closing(BlockPrefetch(reader, reader.arch.blocks, 2)) as blocks:
        assert blocks.take(f"{reader.arch.blocks}.0.{reader.arch.linears[0]}.weight") is not None
    assert blocks.take(name) is None


def test_prefetch_keeps_at_most_one_block_in_memory(tiny_model, tmp_path, monkeypatch):
    alive, most, plain = {}, [0], CheckpointReader.tensor

    def tensor(self, name, *memory):
        found = plain(self, name, *memory)
        if name.endswith(".qweight"):
            alive[name] = found.nbytes
            most[0] = max(most[0], sum(alive.values()))
            weakref.finalize(found, alive.pop, name)
        return found

    reader = CheckpointReader(packed_checkpoint(tiny_model, tmp_path / "packed"))
    block = sum(reader.nbytes(name) for name in reader if f"{reader.arch.blocks}.1." in name and "qweight" in name)
    monkeypatch.setattr(CheckpointReader, "tensor", tensor)
    load(reader.path, device="cpu")
    assert block / 2 < most[0] <= block
    assert not alive


def test_reads_that_have_not_started_are_dropped_on_close():
    started, go, late = threading.Event(), threading.Event(), threading.Event()
    pieces = prefetch([lambda: None, lambda: started.set() or go.wait(10), late.set], 2)
    next(pieces)
    assert started.wait(10)
    threading.Timer(0.05, go.set).start()
    pieces.close()
    assert not late.is_set()


def test_every_tensor_of_a_model_is_read_once(tiny_model, tmp_path, monkeypatch):
    read, plain = [], CheckpointReader.tensor

    def tensor(self, name, *memory):
        read.append((name, threading.current_thread() is threading.main_thread()))
        return plain(self, name, *memory)

    path = packed_checkpoint(tiny_model, tmp_path / "packed")
    monkeypatch.setattr(CheckpointReader, "tensor", tensor)
    load(path, device="cpu")
    names = [name for name, _ in read]
    assert len(names) == len(set(names))
    assert {name for name, main in read if not main} == {name for name in names if ".h." in name or ".layers." in name}
