"""What doctor says of GPU kernels, on machines that lack one thing or another."""

from types import SimpleNamespace

import pytest
import torch

from gptq_belle.kernels import triton_matmul
from gptq_belle.measure import doctor


@pytest.fixture
def card(monkeypatch):
    """A CUDA device of compute capability 8.6 where everything that Triton needs is installed."""
    triton_matmul.unavailable.cache_clear()
    triton_matmul.processor.cache_clear()
    properties = SimpleNamespace(major=8, minor=6, multi_processor_count=82)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(triton_matmul, "find_spec", lambda name: name)
    monkeypatch.setattr(triton_matmul, "c_compiler", lambda: "/usr/bin/gcc")
    monkeypatch.setattr(triton_matmul.Path, "is_file", lambda path: path.name == "Python.h")
    yield properties
    triton_matmul.unavailable.cache_clear()
    triton_matmul.processor.cache_clear()


@pytest.mark.usefixtures("card")
def test_everything_is_there():
    found = doctor.gpu()
    assert found == {"kernel": "triton", "why_not": None, "tables": []}
    assert doctor.gpu_line(found) == "triton; tiles by rule (see gptq-belle tune)"
    found["tables"] = ["a/sm_86.json"]
    assert doctor.gpu_line(found) == "triton; tiles as measured in a/sm_86.json"


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("find_spec", lambda name: None, "triton is not installed"), ("c_compiler", lambda: None, "needs a C compiler")])
@pytest.mark.usefixtures("card")
def test_something_is_missing(name, value, reason, monkeypatch):
    monkeypatch.setattr(triton_matmul, name, value)
    found = doctor.gpu()
    assert found["kernel"] == "dequantize+matmul"
    assert reason in doctor.gpu_line(found)
    assert doctor.gpu_line(found).endswith("weights are expanded for cuBLAS instead")


def test_a_card_that_is_too_old(card):
    card.major, card.minor = 7, 5
    assert "compute capability 8.0 or newer, not 7.5" in doctor.gpu_line(doctor.gpu())


def test_no_card(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor.gpu()
    assert found == {"kernel": None, "why_not": "PyTorch sees no CUDA device", "tables": []}
    assert doctor.gpu_line(found) == "not Triton's: PyTorch sees no CUDA device"
