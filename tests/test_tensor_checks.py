"""The check of a kernel's tensor arguments: each requirement rejects a tensor and names it."""

import pytest
import torch
from conftest import naming

from gptq_belle.kernels.tensor_checks import check_tensors, is_contiguous_float32


@pytest.mark.parametrize(("tensor", "named"), [
    (torch.zeros(2, 4), "(2, 4)"), (torch.zeros(3), "(3,)"), (torch.zeros(2, 3, 1), "(2, 3, 1)"),
    (torch.zeros(2, 3).half(), "torch.float16"), (torch.zeros(3, 2).t(), "not contiguous"),
    (torch.zeros(2, 3, device="meta"), "meta")])
def test_tensor_that_differs_is_rejected(tensor, named):
    check_tensors((2, 3), torch.float32, torch.float64, fitting=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=naming("wrong", named)):
        check_tensors((2, 3), torch.float32, torch.float64, fitting=torch.zeros(2, 3).double(), wrong=tensor)


def test_requirements_that_are_not_given_are_not_checked():
    check_tensors((None, 3), device=None, contiguous=False, first=torch.zeros(3, 7).int().t(),
                  second=torch.zeros(0, 3, device="meta"))
    with pytest.raises(ValueError, match=naming("second")):
        check_tensors((None, 3), device=torch.device("meta"), first=torch.zeros(2, 3, device="meta"),
                      second=torch.zeros(2, 3))


def test_tensors_that_the_native_kernels_read_in_place():
    assert is_contiguous_float32(torch.zeros(2, 3))
    for tensor in (torch.zeros(2, 3).t(), torch.zeros(2).double(), torch.zeros(2, requires_grad=True),
                   torch.zeros(2, device="meta")):
        assert not is_contiguous_float32(tensor)
