"""Memory in huge pages: a tensor's is its own as long as anything holds it, and comes back afterwards."""

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
    reused = MemoryPool()
    first = reused(2 * HUGE_PAGE)
    address, view = first.data_ptr(), first.view(torch.int32)[5:9]
    del first
    assert reused(2 * HUGE_PAGE).data_ptr() != address  # the view holds it
    del view
    again, third = reused(2 * HUGE_PAGE), reused(2 * HUGE_PAGE)
    assert address in (again.data_ptr(), third.data_ptr())
    assert again.data_ptr() != third.data_ptr()
    assert reused(HUGE_PAGE).data_ptr() not in (again.data_ptr(), third.data_ptr())  # of another size


def test_memory_is_returned_to_the_system(monkeypatch):
    mapped = []
    monkeypatch.setattr(huge_pages, "_map_memory",
                        lambda size, make=huge_pages._map_memory: mapped.append(make(size)) or mapped[-1])
    reused = MemoryPool()
    first, second = reused(HUGE_PAGE), reused(HUGE_PAGE)
    kept = [weakref.ref(mapping) for mapping in mapped]
    mapped.clear()
    del first
    assert [ref() is None for ref in kept] == [False, False]
    reused.stop_pooling()
    assert [ref() is None for ref in kept] == [True, False]
    del second
    assert [ref() is None for ref in kept] == [True, True]
    assert reused(HUGE_PAGE).shape == (HUGE_PAGE,)


def test_allocation_outlives_its_pool():
    reused = MemoryPool()
    kept = reused(HUGE_PAGE).fill_(3)
    del reused
    assert int(kept.sum()) == 3 * HUGE_PAGE


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("kind", [{"bits": 4}, {"bits": 8, "sym": False, "act_order": True}, None], ids=str)
def test_nothing_of_a_model_is_overwritten_by_what_is_read_later(tiny_model, tmp_path, monkeypatch, kind, kernels):
    path = tiny_model if kind is None else packed_checkpoint(tiny_model, tmp_path / "packed", **kind)
    if kernels == "torch":
        monkeypatch.setattr(cpu_matmul, "unsupported_reason", lambda *args: "left out")
    ids, mapped = torch.randint(384, (2, 20)), []
    wanted = load(path, device="cpu").logits(ids)
    monkeypatch.setattr(huge_pages, "HUGE_PAGE", 512)  # so that the tensors of a tiny model are large
    monkeypatch.setattr(huge_pages, "_map_memory",
                        lambda size, make=huge_pages._map_memory: mapped.append(size) or make(size))
    found = load(path, device="cpu")
    assert mapped
    assert torch.equal(found.logits(ids), wanted)
