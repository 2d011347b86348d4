"""benchmarks/gpu_check without a GPU: plans, time limits and exit codes; its steps in Triton's interpreter."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_triton import has_working_interpreter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from gpu_check import (  # noqa: E402
    cache_pack,
    correctness,
    kernel_recording,
    matmul,
    parts,
    peers,
    probe,
    solver,
    tuning,
    weights,
)
from gpu_check.child import CallFailed, Child, child, run_all  # noqa: E402
from gpu_check.compilation import Compilation, compilers  # noqa: E402
from gpu_check.plan import Deadline, Record, Step, run_steps  # noqa: E402
from gpu_check.setting import setting_of  # noqa: E402

from gptq_belle.bench.kernel_tuning import VARIED, tune  # noqa: E402
from gptq_belle.kernels.triton_config import KERNELS, MatmulProblem  # noqa: E402

FULL, HOPPER = setting_of(toy=False), (90, 132)
NOTHING = partial(int)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_interpreter = pytest.mark.skipif(not has_working_interpreter(), reason="needs triton 3.9 or newer")


class Here:
    """Stands in for a child: runs calls in this process."""

    def call(self, function, limit):
        try:
            return function()
        except ValueError as error:
            raise CallFailed(str(error)) from error


def fail(reason):
    raise ValueError(reason)


# Steps and their record.


def test_record_of_steps():
    record = Record()
    steps = [Step("one", partial(int, "1")), Step("two", partial(fail, "broken")), Step("three", partial(int, "3"))]
    run_steps(steps, record, Deadline(60), Here())
    assert record.results == {"one": 1, "three": 3}
    assert record.failed == {"two": "broken"}
    assert not record.complete
    assert "two" in record.report()
    assert Record(results={"one": 1}, left_out={"peer": "not installed"}).complete


def test_steps_after_the_time_limit_are_missing():
    record = Record()
    run_steps([Step("slow", partial(time.sleep, 0.2)), Step("never", NOTHING)], record, Deadline(0.1), Here())
    assert list(record.results) == ["slow"]
    assert record.missing == ["never"]
    assert not record.complete
    assert "never" in record.report()


def test_first_failure_of_a_group_is_that_of_all():
    record = Record()
    steps = [Step("a", partial(fail, "no"), group="peer"), Step("b", NOTHING, group="peer"), Step("c", NOTHING)]
    run_steps(steps, record, Deadline(60), Here())
    assert record.failed == {"a": "no", "b": "no"}
    assert list(record.results) == ["c"]


def test_record_is_saved_meanwhile(monkeypatch):
    monkeypatch.setattr("gpu_check.plan.SAVE_EVERY", 0.0)
    saved = []
    record = Record()
    run_steps([Step("a", NOTHING), Step("b", NOTHING)], record, Deadline(60), Here(),
              lambda: saved.append(list(record.results)))
    assert saved == [["a"], ["a", "b"]]


# Child processes.


def test_child_survives_its_calls():
    with child(NOTHING) as one:
        assert one.call(partial(int, "7"), 60) == 7
        with pytest.raises(CallFailed, match="ValueError"):
            one.call(partial(int, "x"), 60)
        process = one._process.pid
        assert one.call(os.getpid, 60) == process
        with pytest.raises(CallFailed, match="code 3"):
            one.call(partial(os._exit, 3), 60)
        start = time.monotonic()
        with pytest.raises(CallFailed):
            one.call(partial(time.sleep, 60), 0.5)
        assert time.monotonic() - start < 30
        assert one.call(os.getpid, 60) != process


def test_calls_in_several_children():
    children = [Child(NOTHING), Child(NOTHING)]
    try:
        found = run_all(children, {name: partial(int, name) for name in ("1", "x", "3")}, time.monotonic() + 60)
        assert (found["1"], found["3"]) == (1, 3)
        assert isinstance(found["x"], CallFailed)
        assert run_all(children, {"1": partial(int, "1")}, time.monotonic()) == {}
    finally:
        for one in children:
            one.stop()


# What is planned.


def test_checks_cover_every_kernel_and_format():
    formats = list(correctness.formats(FULL))
    assert {(one.bits, one.group, one.dtype) for one in formats} >= {
        (bits, group, dtype) for bits in (2, 3, 4, 8) for group in (32, 64, 128)
        for dtype in (torch.float16, torch.bfloat16)}
    configs = list(correctness.configs(FULL, *HOPPER))
    assert {one.plan.kernel for one in configs} == set(KERNELS)
    for name, values in VARIED.items():
        assert {getattr(one.plan.config, name) for one in configs if one.plan.config} >= set(values)
    names = [step.name for step in correctness.steps(FULL, *HOPPER)]
    assert len(names) == len(set(names)) > len(formats) + len(configs)


def test_peers_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(matmul, "installed", lambda name: "1.0" if name == "gemlite" else None)
    left_out = {}
    steps = matmul.steps(FULL, (*matmul.FIRST, *matmul.OTHERS), left_out)
    assert set(left_out) == {"GPTQModel Marlin", "GPTQModel Triton"}
    variants = list(dict.fromkeys(step.name.partition(", ")[2] for step in steps))
    assert variants == ["ours, 4 bits", peers.CUBLAS, "torch int4", "ours, 8 bits", "gemlite"]
    assert len(steps) == 5 * 9


@pytest.mark.parametrize(("script", "outcome"), [
    ("echo '0 errors'", "output"), ("echo 'Device not supported'; exit 1", "unsupported"), ("exit 9", None)])
def test_result_of_compute_sanitizer(script, outcome, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert [step.name for step in probe.sanitizer_steps(FULL, {})] == ["compute-sanitizer"]
    if outcome is None:
        with pytest.raises(RuntimeError):
            probe.run_sanitizer()
    else:
        assert outcome in probe.run_sanitizer()


def test_small_numbers_of_rows_are_tuned_first():
    problems = tuning.problems(FULL)
    assert [problem.rows for problem in problems] == [8] * 9 + [16] * 9 + [32] * 9 + [64] * 9
    assert len(set(problems)) == 36


# What is worked out from the results.


def test_table_and_goals_of_products():
    def result(variant, size, times):
        return {"inputs": 256, "outputs": 128, "variant": variant, "bytes": size,
                "lines": [{"rows": rows, "seconds": seconds} for rows, seconds in times]}

    rows = matmul.table({"ours": result("ours, 4 bits", 1000, [(1, 2.0), (512, 8.0)]),
                         "cublas": result(peers.CUBLAS, 4000, [(512, 4.0)]), "copy": {"Bps": 1}}, 1000, 1e6)
    one, many, cublas = rows
    assert (one["share_of_copy"], one["times_cublas"], many["times_cublas"], cublas["times_cublas"]) == (
        0.5, None, 0.5, 1.0)
    assert many["share_of_peak"] == pytest.approx(2 * 512 * 256 * 128 / 8.0 / 1e6)
    few, middle, most, apart = matmul.goals(rows)
    assert (few["worst"], few["reached"], middle["worst"], middle["reached"]) == (0.5, False, 0.5, False)
    assert most["reached"] is apart["reached"] is None
    assert solver.goal({"a": {"times_torch": 12.0}, "b": {"times_torch": 11.0}})["worst"] == 11.0


# Tuning.


class NoCompilers:
    def compile(self, cases, deadline):
        return Compilation(0, 0.0, 1, [], [], [])


class PretendedGpu:
    """Times of plans by a formula; `broken` plans fail."""

    def __init__(self, broken=()):
        self.broken, self.calls = broken, 0

    def call(self, function, limit):
        self.calls += 1
        _, problem, plan = function.args
        if problem.inputs in self.broken:
            raise CallFailed("wrong product")
        return seconds_of(plan)


def seconds_of(plan):
    return 9.0 if plan.config is None else 1 + abs(plan.config.SPLIT_K - 3) + abs(plan.config.num_stages - 5)


def tuner_with(gpu, seconds=60.0):
    small = FULL._replace(sizes=FULL.sizes._replace(shapes=((256, 128), (512, 128)), tuned_rows=(8, 16)))
    return tuning.Tuner(small, *HOPPER, gpu, NoCompilers(), Deadline(seconds))


def test_tuning_together_finds_what_tuning_alone_finds(tmp_path):
    record, tuner = Record(), tuner_with(PretendedGpu())
    tuning.run(tuner, record, tmp_path, "a GPU")
    assert record.complete
    entries = json.loads((tmp_path / "sm_90.json").read_text())["entries"]
    assert len(entries) == len(record.results) == 4
    alone = tune(MatmulProblem(8, 128, 512, 4, 128, "float16"), *HOPPER, seconds_of)
    entry = next(one for one in entries if (one["rows"], one["inputs"]) == (8, 512))
    assert entry["config"] == alone.plan.config._asdict()


def test_tuning_without_time_names_every_problem(tmp_path):
    record = Record()
    tuning.run(tuner_with(PretendedGpu(), seconds=0.0), record, tmp_path, "a GPU")
    assert len(record.missing) == 4
    assert not list(tmp_path.iterdir())


def test_problem_whose_plans_fail_is_given_up(tmp_path):
    record, gpu = Record(), PretendedGpu(broken=(512,))
    tuning.run(tuner_with(gpu), record, tmp_path, "a GPU")
    assert len(record.failed) == len(record.results) == 2
    assert not record.missing
    assert len(record.left_out) <= 2 * (tuning.FAILURES + 1)


# Compilation in advance.


def test_cache_moves_to_another_folder(tmp_path):
    kernel = tmp_path / "cache" / "KEY"
    kernel.mkdir(parents=True)
    for name in ("a.cubin", "a.json", "a.ptx"):
        (kernel / name).write_text(name)
    (kernel / "__grp__a.json").write_text(json.dumps({"child_paths": {
        name: str(kernel / name) for name in ("a.cubin", "a.json", "a.ptx")}}))
    cache_pack.pack(tmp_path / "cache", tmp_path / "pack.zip")
    there = tmp_path / "elsewhere"
    assert cache_pack.unpack(tmp_path / "pack.zip", there) == 1
    paths = json.loads((there / "KEY" / "__grp__a.json").read_text())["child_paths"]
    assert paths == {name: str(there / "KEY" / name) for name in ("a.cubin", "a.json")}
    assert (there / "KEY" / "a.cubin").read_text() == "a.cubin"


def launched_keys(arch, processors, cases):
    """Keys in Triton's cache that the product's launches find there; for a child process."""
    from triton import knobs

    found = []
    knobs.compilation.listener = lambda *, metadata, cache_hit, **_: found.append((metadata["hash"], cache_hit))
    for case in cases:
        try:
            case(kernel_recording.META)
        except AttributeError:  # the absent device cannot launch
            continue
    return found


@needs_triton
@pytest.mark.slow
def test_a_launch_finds_the_kernel_that_was_compiled_in_advance(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    problem = MatmulProblem(1, 128, 256, 4, 128, "float16")
    cases = [weights.product_case(problem), weights.product_case(problem, zero=-1, ordered=False, bias=True)]
    with compilers(*HOPPER, with_launcher=False, most=2) as compiling:
        done = compiling.compile(cases, Deadline(300))
        assert done.kernels >= 3
        assert not done.problem()
        assert compiling.compile(cases, Deadline(300)).kernels == 0
    with child(partial(kernel_recording.pretend, *HOPPER)) as other:
        keys = other.call(partial(launched_keys, *HOPPER, cases), 120)
    assert len(keys) >= 2
    assert all(hit for _, hit in keys)


def test_no_kernel_has_an_argument_that_triton_takes_for_an_option():
    """Triton's interpreter accepts them; a launch on a device fails."""
    functions = [node for path in (ROOT / "kernels").glob("triton_*.py")
                 for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(node, ast.FunctionDef) and any("jit" in ast.dump(one) for one in node.decorator_list)]
    assert len(functions) > 20
    for function in functions:
        assert not {argument.arg for argument in function.args.args} & {"stream", "device", "device_type", "grid"}


@needs_triton
@pytest.mark.slow
def test_every_kernel_that_the_product_launches_is_checked():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("triton_*.py"))
    launched = set(re.findall(r"\bLaunch\((\w+_kernel)|(\w+)\[\(triton", sources))
    with child(partial(kernel_recording.pretend, *HOPPER)) as other:
        specs = other.call(partial(kernel_recording.record, correctness.cases(FULL, *HOPPER)), 300)
    assert {spec.function for spec in specs} == {name for pair in launched for name in pair if name}


# In Triton's interpreter, and the command.


def environment(**more):
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "PYTHON": sys.executable} | more


@needs_interpreter
def test_steps_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "gpu_check_interpreted.py"]
    run = subprocess.run(command, cwd=Path(__file__).parent, env=environment(TRITON_INTERPRET="1"), text=True,
                         capture_output=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def gpu_check(part, out, *options):
    return subprocess.run([ROOT / "benchmarks" / "gpu_check.sh", part, "--out", out, *options], capture_output=True,
                          text=True, env=environment(TRITON_CACHE_DIR=str(out / "cache")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_exit_code_is_3(tmp_path):
    assert gpu_check("probe", tmp_path).returncode == 3
    assert not (tmp_path / "probe.json").exists()


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("part", parts.PARTS)
def test_part_at_toy_sizes(part, tmp_path):
    run = gpu_check(part, tmp_path, "--toy", "--budget", "1500")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads((tmp_path / f"{part}.json").read_text())
    assert found["complete"]
    assert found["results"]


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("part", parts.PARTS)
def test_part_that_runs_out_of_time(part, tmp_path):
    run = gpu_check(part, tmp_path, "--toy", "--budget", "12")
    assert run.returncode == 1, run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads((tmp_path / f"{part}.json").read_text())
    assert not found["complete"]
    for name in (*found["missing"], *found["failed"]):
        assert name in run.stdout
    assert found["missing"]
