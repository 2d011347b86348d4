"""doctor: its report on GPU kernels on incomplete machines, and wrong kernels that its self-test detects."""

import json
from types import SimpleNamespace

import pytest
import torch

from gptq_belle.bench import doctor
from gptq_belle.bench.self_test import self_test
from gptq_belle.cli import doctor as command
from gptq_belle.kernels import cpu_matmul, reference, triton_matmul
from gptq_belle.kernels.native_library import load_library


@pytest.fixture
def card(monkeypatch):
    """A CUDA device of compute capability 8.6 with everything that Triton needs."""
    triton_matmul.unavailable_reason.cache_clear()
    triton_matmul.device_properties.cache_clear()
    properties = SimpleNamespace(major=8, minor=6, multi_processor_count=82)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(triton_matmul, "find_spec", lambda name: name)
    monkeypatch.setattr(triton_matmul, "c_compiler", lambda: "/usr/bin/gcc")
    monkeypatch.setattr(triton_matmul, "has_built_launcher", lambda: False)
    monkeypatch.setattr(triton_matmul.Path, "is_file", lambda path: path.name == "Python.h")
    yield properties
    triton_matmul.unavailable_reason.cache_clear()
    triton_matmul.device_properties.cache_clear()


@pytest.mark.usefixtures("card")
def test_doctor_reports_a_complete_installation():
    found = doctor.gpu(torch.device("cuda", 0))
    assert (found["kernel"], found["why_not"], found["tables"]) == ("triton", None, [])
    assert command.gpu_kernels_line(found) == "triton; tiles by rule (see gptq-belle tune)"
    found["tables"] = ["a/sm_86.json"]
    assert command.gpu_kernels_line(found) == "triton; tiles as measured in a/sm_86.json"


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("find_spec", lambda name: None, "triton is not installed"), ("c_compiler", lambda: None, "needs a C compiler")])
@pytest.mark.usefixtures("card")
def test_doctor_reports_missing_parts(name, value, reason, monkeypatch):
    monkeypatch.setattr(triton_matmul, name, value)
    found = doctor.gpu(torch.device("cuda", 0))
    assert found["kernel"] == "dequantize+matmul"
    assert reason in command.gpu_kernels_line(found)
    assert command.gpu_kernels_line(found).endswith("weights are dequantized for cuBLAS instead")


def test_gpu_below_the_minimum_capability_is_reported(card):
    card.major, card.minor = 7, 0
    assert "compute capability 7.5 or newer, not 7.0" in command.gpu_kernels_line(doctor.gpu(torch.device("cuda", 0)))


def test_missing_gpu_is_reported(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor.gpu(torch.device("cuda", 0))
    assert (found["kernel"], found["why_not"], found["tables"]) == (None, "PyTorch sees no CUDA device", [])
    assert command.gpu_kernels_line(found) == "not Triton: PyTorch sees no CUDA device"


def test_missing_native_kernels_are_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "self_test", lambda devices: [])
    found = doctor.examine("cpu")
    found["native"] = {"isa": None, "usable": [], "why_not": "no compiler here"}
    found["kernels"] = [row | {"why": "no compiler here"} for row in found["kernels"]]
    command.show(found)
    assert capsys.readouterr().out.count("no compiler here") == 1


def test_every_kernel_of_this_cpu_passes_the_self_test(belle):
    code, out, _ = belle("doctor", "--device", "cpu", "--json")
    checks = json.loads(out)["self_test"]
    assert code == 0
    assert all(check["passed"] and check["error"] <= check["allowed"] for check in checks)
    kernels = {check["kernel"] for check in checks}
    assert {"groupwise", "reference"} <= kernels
    if not isinstance(load_library(), str):
        assert {f"native {isa}" for isa in load_library().usable_isas} <= kernels
    assert all(check["error"] > 0 for check in checks)  # something was computed, with less precision than float64


def test_kernel_wrong_by_one_percent_fails_the_self_test(monkeypatch, belle):
    correct = reference.groupwise_matmul
    monkeypatch.setattr(reference, "groupwise_matmul", lambda x, weight: 1.01 * correct(x, weight))
    code, out, _ = belle("doctor", "--device", "cpu")
    assert code == 3
    assert any("groupwise, 4 bit" in line and "1.0e-02" in line for line in out.splitlines())


@pytest.mark.skipif(isinstance(load_library(), str), reason="no compiled kernels")
def test_nan_and_exceptions_fail_the_self_test(monkeypatch):
    def broken(x, weight, isa):
        if isa == "portable":
            raise ValueError("no such thing")
        return x.new_full((len(x), weight.out_features), torch.nan)

    monkeypatch.setattr(cpu_matmul, "quant_matmul", broken)
    checks = [check for check in self_test([torch.device("cpu")]) if check.kernel.startswith("native")]
    assert checks
    assert not any(check.passed for check in checks)
    assert {check.why_not for check in checks if check.kernel == "native portable"} == {"no such thing"}
    assert any("no such thing" in line for line in command.self_test_lines(
        [check._asdict() | {"passed": check.passed} for check in checks]))
