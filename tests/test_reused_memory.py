"""Memory in huge pages: a tensor's is its own as long as anything holds it, and comes back afterwards."""

import pytest
import torch

from gptq_belle.kernels.memory import HUGE_PAGE, Reused, empty_bytes


@pytest.mark.parametrize("size", [0, 1, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1, 3 * HUGE_PAGE + 5])
@pytest.mark.parametrize("make", [empty_bytes, Reused()])
def test_it_is_as_large_as_asked_for(make, size):
    memory = make(size)
    assert memory.shape == (size,)
    assert memory.dtype == torch.uint8
    assert size < HUGE_PAGE or memory.data_ptr() % HUGE_PAGE == 0
    assert int(memory.fill_(7).sum()) == 7 * size


def test_it_comes_back_when_the_last_view_is_gone():
    reused = Reused()
    first = reused(2 * HUGE_PAGE)
    address, view = first.data_ptr(), first.view(torch.int32)[5:9]
    del first
    assert reused(2 * HUGE_PAGE).data_ptr() != address  # the view holds it
    del view
    again, third = reused(2 * HUGE_PAGE), reused(2 * HUGE_PAGE)
    assert address in (again.data_ptr(), third.data_ptr())
    assert again.data_ptr() != third.data_ptr()
    assert reused(HUGE_PAGE).data_ptr() not in (again.data_ptr(), third.data_ptr())  # of another size


def test_it_outlives_its_giver():
    reused = Reused()
    kept = reused(HUGE_PAGE).fill_(3)
    del reused
    assert int(kept.sum()) == 3 * HUGE_PAGE
