"""Memory in huge pages: it is reused only when no tensor refers to it any more."""

import weakref

import pytest
import torch
from conftest import packed_checkpoint

from gptq_belle import load
from gptq_belle.kernels import cpu_matmul, huge_pages
from gptq_belle.kernels.huge_pages import HUGE_PAGE, MemoryPool, empty_bytes


@pytest.mark.parametrize("size", [0, 1, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1, 3 * HUGE_PAGE + 5])
@pytest.mark.parametrize("make", [empty_bytes, MemoryPool()])
def test_allocation_has_the_requested_size(make, size):
    found = make(size)
    assert found.shape == (size,)
    assert found.dtype == torch.uint8
    assert size < HUGE_PAGE or found.data_ptr() % HUGE_PAGE == 0
    assert int(found.fill_(7).sum()) == 7 * size


def test_allocation_is_reused_when_the_last_view_is_gone():
    pool = MemoryPool()
    first = pool(2 * HUGE_PAGE)
    address, view = first.data_ptr(), first.view(torch.int32)[5:9]
    del first
    assert pool(2 * HUGE_PAGE).data_ptr() != address  # the view refers to it
    del view
    again, third = pool(2 * HUGE_PAGE), pool(2 * HUGE_PAGE)
    assert address in (again.data_ptr(), third.data_ptr())
    assert again.data_ptr() != third.data_ptr()
    assert pool(HUGE_PAGE).data_ptr() not in (again.data_ptr(), third.data_ptr())  # of another size


def test_memory_is_returned_to_the_system(monkeypatch):
    mapped = []
    monkeypatch.setattr(huge_pages, "_map_memory",
                        lambda size, make=huge_pages._map_memory: mapped.append(make(size)) or mapped[-1])
    pool = MemoryPool()
    first, second = pool(HUGE_PAGE), pool(HUGE_PAGE)
    kept = [weakref.ref(mapping) for mapping in mapped]
    mapped.clear()
    del first
    assert [ref() is None for ref in kept] == [False, False]
    pool.stop_pooling()
    assert [ref() is None for ref in kept] == [True, False]
    del second
    assert [ref() is None for ref in kept] == [True, True]
    assert pool(HUGE_PAGE).shape == (HUGE_PAGE,)


def test_allocation_outlives_its_pool():
    pool = MemoryPool()
    kept = pool(HUGE_PAGE).fill_(3)
    del pool
    assert int(kept.sum()) == 3 * HUGE_PAGE


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("kind", [{"bits": 4}, {"bits": 8, "sym": False, "act_order": True}, None], ids=str)
def test_reused_memory_does_not_overwrite_a_loaded_model(tiny_model, tmp_path, monkeypatch, kind, kernels):
    path = tiny_model if kind is None else packed_checkpoint(tiny_model, tmp_path / "packed", **kind)
    if kernels == "torch":
        monkeypatch.setattr(cpu_matmul, "unsupported_reason", lambda *args: "left out")
    ids, mapped = torch.randint(384, (2, 20)), []
    wanted = load(path, device="cpu").logits(ids)
    monkeypatch.setattr(huge_pages, "HUGE_PAGE", 512)  # so that the tensors of a tiny model count as large
    monkeypatch.setattr(huge_pages, "_map_memory",
                        lambda size, make=huge_pages._map_memory: mapped.append(size) or make(size))
    found = load(path, device="cpu")
    assert mapped
    assert torch.equal(found.logits(ids), wanted)
