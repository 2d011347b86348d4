"""Triton without a GPU: the layout, the plan of a product, and the kernels in the interpreter."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle_format import formula, random_words

from gptq_belle.engine.linear import QuantLinear
from gptq_belle.errors import UsageError
from gptq_belle.kernels import triton_config, triton_layout, triton_matmul
from gptq_belle.kernels.layout import checked_weight, fuse_weights
from gptq_belle.kernels.reference import dequantize
from gptq_belle.kernels.triton_config import ROW_BUCKETS, LaunchPlan, MatmulProblem, TileConfig

TESTS = Path(__file__).parent
CUDA = torch.device("cuda", 0)
IN_ORDER = torch.arange(256) // 128
PROBLEM = MatmulProblem(16, 4096, 4096, 4, 128, "float16")


def laid_out(words, bits):
    return triton_layout.prepare(checked_weight(**words, bits=bits, zero_offset=1))


def has_working_interpreter() -> bool:
    """Whether Triton's interpreter works: before 3.9 it fails with NumPy 2.4, where its scalars are arrays."""
    return find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)


@pytest.mark.skipif(not has_working_interpreter(), reason="needs triton 3.9 or newer")
@pytest.mark.parametrize("file", ["triton_interpreted.py", "skinny_interpreted.py"])
def test_kernels_in_the_interpreter(file):
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file], cwd=TESTS,
                         env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_layout_of_4_bit_codes_in_words():
    """Word i of a block holds the codes of inputs i, 32 + i, 64 + i, 96 + i, from the lowest nibble up."""
    codes = torch.zeros(128, 2, dtype=torch.int32)
    codes[[3, 35, 67, 99], 1] = torch.tensor([0x1, 0x2, 0x3, 0xA], dtype=torch.int32)
    words = triton_layout.pack_slices(codes, 4, 128)
    assert (words.dtype, words.shape) == (torch.int16, (1, 2, 32))
    assert words[0, 1, 3] == 0xA321 - 0x10000
    assert words.count_nonzero() == 1


def test_layout_of_8_bit_codes_in_words():
    codes = torch.zeros(256, 1, dtype=torch.int32)
    codes[[128 + 5, 128 + 64 + 5], 0] = torch.tensor([0x12, 0x34], dtype=torch.int32)
    words = triton_layout.pack_slices(codes, 8, 128)
    assert words.shape == (2, 1, 64)
    assert words[1, 0, 5] == 0x3412


@pytest.mark.parametrize(("bits", "group_size", "run", "block"), [
    (4, 32, 32, 128), (4, 64, 64, 128), (4, 128, 128, 128), (4, -1, 128, 128), (8, 32, 32, 64), (8, 64, 64, 128),
    (3, 128, 128, 128), (2, 32, 32, 128)])
def test_lengths_of_runs_and_blocks(bits, group_size, run, block):
    weight = laid_out(random_words(bits, 512, 32, group_size), bits)
    assert (weight.run, weight.block, weight.places) == (run, block, 512)
    assert weight.order is None
    assert weight.words.shape == (512 // block, 128, block * weight.bits // 16)
    assert weight.scales.shape == (512 // run, 128)


def test_padding_of_the_last_block_does_not_shorten_runs():
    weight = laid_out(random_words(4, 288, 8, -1), 4)
    assert (weight.run, weight.places) == (128, 384)


def test_inputs_of_act_order_are_sorted_by_group():
    words = random_words(4, 128, 8, 32, act_order=True)
    weight = laid_out(words, 4)
    assert torch.equal(weight.order, words["g_idx"].sort(stable=True).indices.int())


def test_equal_zero_points_are_one_number_which_may_be_16():
    words = random_words(4, 128, 8, 32)
    assert laid_out(words, 4).zeros.max() == 16
    words["qzeros"].fill_(-1)
    weight = laid_out(words, 4)
    assert (weight.zeros, weight.zero) == (None, 16)


def test_fused_weights_are_concatenated_outputs():
    parts = [random_words(4, 64, outputs, 32) for outputs in (8, 24, 16)]
    fused = fuse_weights([checked_weight(**words, bits=4, zero_offset=1) for words in parts])
    expected = torch.cat([formula(**words, bits=4, v1=True) for words in parts])
    assert torch.equal(dequantize(fused).double().t(), expected)


@pytest.mark.parametrize(("other", "message"), [
    ({"bits": 8}, "bits of"), ({"zero_offset": 0}, "zero_offset of"), ({"act_order": True}, "g_idx"),
    ({"dtype": torch.float32}, "scales of")])
def test_weights_of_different_formats_are_not_fused(other, message):
    def weight(bits=4, zero_offset=1, act_order=False, dtype=torch.float16):
        words = random_words(bits, 64, 8, 32, act_order=act_order)
        return checked_weight(**words | {"scales": words["scales"].to(dtype)}, bits=bits, zero_offset=zero_offset)

    with pytest.raises(ValueError, match=message):
        fuse_weights([weight(), weight(**other)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_state_dict_equals_the_checkpoint(bits):
    words = random_words(bits, 96, 32, 32, act_order=True)
    layer = QuantLinear(laid_out(words, bits), torch.zeros(32))
    state = layer.state_dict()
    assert set(state) == {*words, "bias"}
    assert all(torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in words.items())
    with pytest.raises(UsageError):
        layer.to("meta")


@pytest.fixture
def a_gpu(monkeypatch):
    """Pretend a machine with an H100 and everything installed."""
    monkeypatch.setattr(triton_matmul, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(triton_matmul, "device_properties", lambda device: (90, 132))


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(("g_idx", "device", "dtype", "reason"), [
    (IN_ORDER, CUDA, torch.float16, None),
    (torch.arange(256) % 2, CUDA, torch.bfloat16, None),
    (torch.arange(256) // 8, CUDA, torch.float16, "fill runs of 32"),
    (IN_ORDER, CUDA, torch.float32, "not torch.float32"),
    (IN_ORDER, torch.device("cpu"), torch.float16, "not cpu"),
])
def test_unsupported_weights_and_activations(g_idx, device, dtype, reason):
    found = triton_matmul.unsupported_reason(g_idx, device, dtype)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("missing", "reason"), [("find_spec", "not installed"), ("c_compiler", "C compiler")])
def test_missing_requirement_is_named(monkeypatch, missing, reason):
    if missing != "find_spec":
        monkeypatch.setattr(triton_matmul, "find_spec", lambda name: name)
    monkeypatch.setattr(triton_matmul, missing, lambda *_: None)
    monkeypatch.setattr(triton_matmul, "has_built_launcher", lambda: False)
    assert reason in triton_matmul.unavailable_reason.__wrapped__(CUDA)


def test_launcher_that_was_built_before_replaces_a_compiler(monkeypatch):
    monkeypatch.setattr(triton_matmul, "find_spec", lambda name: name)
    monkeypatch.setattr(triton_matmul, "c_compiler", lambda: None)
    monkeypatch.setattr(triton_matmul, "has_built_launcher", lambda: False)
    assert "C compiler" in triton_matmul.unavailable_reason.__wrapped__(CUDA)
    monkeypatch.setattr(triton_matmul, "has_built_launcher", lambda: True)
    assert "C compiler" not in triton_matmul.unavailable_reason.__wrapped__(CUDA)


@pytest.mark.parametrize(("rows", "most"), [(1, 8), (8, 8), (9, 16), (64, 64), (65, 128), (2048, 2048), (10**6, 2048)])
def test_rows_are_rounded_up_to_a_bucket(rows, most):
    assert triton_config.row_bucket(rows) == most


@pytest.mark.usefixtures("a_gpu")
def test_bfloat16_needs_tensor_cores(monkeypatch):
    monkeypatch.setattr(triton_matmul, "device_properties", lambda device: (75, 40))
    assert triton_matmul.unsupported_reason(IN_ORDER, CUDA, torch.float16) is None
    assert triton_matmul.unsupported_reason(IN_ORDER, CUDA, torch.bfloat16)


@pytest.mark.parametrize(("rows", "kernel"), [(8, "skinny"), (16, "skinny"), (32, "expand"), (2048, "expand")])
def test_more_than_16_rows_are_left_to_cublas_without_tensor_cores_in_triton(rows, kernel):
    problem = MatmulProblem(rows, 4096, 4096, 4, 128, "float16")
    assert triton_config.default_plan(problem, 75, 40).kernel == kernel


PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}


@pytest.mark.parametrize("arch", PROCESSORS)
@pytest.mark.parametrize("rows", ROW_BUCKETS)
@pytest.mark.parametrize(("outputs", "inputs"), [(4096, 4096), (11008, 4096), (4096, 11008), (250880, 4096), (8, 128)])
def test_rule_fills_waves_of_the_device(arch, rows, outputs, inputs):
    """No multiprocessor has much more work than the others, and no part of K is shorter than a pipeline."""
    problem = MatmulProblem(rows, outputs, inputs, 4, 128, "float16")
    kernel, config = triton_config.default_plan(problem, arch, PROCESSORS[arch])
    assert kernel == ("skinny" if rows <= 64 else "expand" if rows >= 1024 and arch in (80, 90, 100) else "gemm")
    if config is None:
        return
    parts, blocks = config.SPLIT_K, inputs // 128
    assert parts == 1 or blocks // parts >= max(triton_config.MIN_BLOCKS, 2 * config.K_WARPS)
    tiles = -(-rows // config.BM) * -(-outputs // config.BN)
    together = PROCESSORS[arch] * triton_config.programs_per_multiprocessor(kernel, config, problem, arch)
    if kernel == "skinny" and outputs > 8:
        busiest = -(-tiles * parts // PROCESSORS[arch]) / (tiles * parts / PROCESSORS[arch])
        assert tiles * parts > together or busiest <= 1.4
        return

    def time(parts):
        """In blocks of K, one wave after another."""
        return -(-tiles * parts // together) * -(-blocks // parts)

    possible = [parts for parts in triton_config.SPLITS if parts == 1 or blocks // parts >= triton_config.MIN_BLOCKS]
    assert time(parts) <= 1.5 * min(map(time, possible)) + 4


@pytest.mark.parametrize(("outputs", "inputs", "tile"), [
    (12288, 4096, TileConfig(8, 32, 128, 1, 4, 4, 4)),  # 384 programs on 132 multiprocessors: 97 % of three each
    (4096, 4096, TileConfig(8, 32, 128, 1, 16, 2, 16)),  # 128 programs: one each, with enough warps to read and unpack
    (5120, 5120, TileConfig(8, 64, 128, 8, 2, 4)),  # 80 tiles of 64 outputs in 8 parts: 97 % of five each
    (250880, 4096, TileConfig(8, 32, 128, 1, 8, 3, 8)),
])
def test_tiles_of_few_rows_on_an_h100(outputs, inputs, tile):
    problem = MatmulProblem(8, outputs, inputs, 4, 128, "float16")
    assert triton_config.default_plan(problem, 90, 132).config == tile


@pytest.mark.parametrize("arch", PROCESSORS)
@pytest.mark.parametrize(("bits", "run"), [(4, 128), (4, 32), (8, 128), (8, 32)])
def test_warps_that_share_inputs_are_two_for_few_rows(arch, bits, run):
    for rows in (8, 16):
        problem = MatmulProblem(rows, 4096, 4096, bits, run, "float16")
        config = triton_config.default_plan(problem, arch, PROCESSORS[arch]).config
        assert config.num_warps == (2 if config.K_WARPS == 1 else config.K_WARPS)


@pytest.mark.parametrize(("arch", "programs"), [(80, 3), (89, 2), (90, 3)])
def test_several_programs_share_a_multiprocessor_with_64_rows(arch, programs):
    problem = MatmulProblem(64, 4096, 4096, 4, 128, "float16")
    kernel, config = triton_config.default_plan(problem, arch, PROCESSORS[arch])
    assert (config.num_warps, triton_config.max_registers(kernel, config, 4, 128, arch)) == (4, 168)
    assert triton_config.programs_per_multiprocessor(kernel, config, problem, arch) == programs


def test_two_programs_of_many_rows_share_a_multiprocessor_of_an_h100():
    for bits in (4, 8):
        problem = MatmulProblem(512, 4096, 4096, bits, 128, "float16")
        kernel, config = triton_config.default_plan(problem, 90, 132)
        assert triton_config.launch_options(kernel, config, bits, 128, 90)["maxnreg"] == 128
        assert triton_config.programs_per_multiprocessor(kernel, config, problem, 90) == 2


@pytest.mark.parametrize("arch", triton_config.EMPTY_SQUARE_TILE)
def test_tile_that_is_compiled_to_an_empty_kernel_is_refused(arch, tmp_path, monkeypatch):
    square = TileConfig(128, 128, 64, 1, 8, 3)
    with pytest.raises(triton_config.UnsupportedTileError):
        triton_config.launch_options("gemm", square, 4, 128, arch)
    entry = PROBLEM._asdict() | {"kernel": "gemm", "config": square._asdict()}
    (tmp_path / f"sm_{arch}.json").write_text(json.dumps({"entries": [entry]}), encoding="utf-8")
    monkeypatch.setenv("GPTQ_BELLE_TUNING", str(tmp_path))
    with pytest.raises(ValueError, match=f"sm_{arch}.json"):
        triton_config.tuned_plans.__wrapped__(arch)


@pytest.mark.parametrize("arch", triton_config.SHARED_MEMORY_KIB)
@pytest.mark.parametrize(("bits", "run"), [(4, 128), (4, 32), (8, 128), (8, 32)])
def test_rule_chooses_tiles_that_are_compiled(arch, bits, run):
    for rows in ROW_BUCKETS:
        kernel, config = triton_config.default_plan(MatmulProblem(rows, 4096, 4096, bits, run, "float16"), arch, 132)
        assert kernel == "expand" or triton_config.launch_options(kernel, config, bits, run, arch)


@pytest.mark.parametrize(("arch", "warps"), [(80, 16), (86, 4), (89, 4), (90, 16), (120, 4)])
def test_most_warps_that_share_k_fit_into_shared_memory(arch, warps):
    problems = [MatmulProblem(8, outputs, 4096, 4, 128, "float16") for outputs in range(128, 16384, 128)]
    assert max(triton_config.default_plan(one, arch, 128).config.K_WARPS for one in problems) <= warps


def weight_on_meta(blocks, columns):
    """A weight of 4 bits without values."""
    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    return triton_layout.SlicedWeight(
        empty(blocks, columns, 32, dtype=torch.int16), empty(blocks, columns, dtype=torch.float16), None, None,
        empty(0, dtype=torch.int32), 128 * blocks, columns, 128, 4, 8, 4, blocks, 0)


@pytest.mark.parametrize(("blocks", "columns", "rows", "plan"), [
    (2**13, 2**13, 1, LaunchPlan("skinny", TileConfig(8, 64, 128, 1, 2, 4))),  # 2**31 words
    (2**13, 2**13, 65, LaunchPlan("gemm", TileConfig(64, 64, 128, 1, 8, 3))),
    (2**13, 2**13, 65, LaunchPlan("expand", None)),
    (2**9, 2**14, 2**15, LaunchPlan("skinny", TileConfig(64, 64, 128, 1, 4, 3))),  # 2**31 activations
    (32, 2**14, 2**13, LaunchPlan("skinny", TileConfig(64, 64, 128, 16, 4, 3))),  # 16 x 2**27 sums of parts
    (32, 2**14, 2**13, LaunchPlan("gemm", TileConfig(64, 64, 128, 16, 8, 3))),
])
def test_tensors_beyond_32_bit_offsets_are_refused(blocks, columns, rows, plan):
    weight = weight_on_meta(blocks, columns)
    x = torch.empty(rows, weight.in_features, dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match="elements"):
        triton_matmul.quant_matmul(x, weight, None, plan)


def test_offsets_up_to_the_limit_are_accepted():
    triton_config.check_offsets(words=triton_config.MAX_ELEMENTS)
    with pytest.raises(ValueError, match="words"):
        triton_config.check_offsets(words=triton_config.MAX_ELEMENTS + 1)


@pytest.mark.parametrize(("l2_cache", "expected"), [(50 << 20, (50 << 20) // 3), (0, 16 << 20),
                                                     (6 << 20, 8 << 20)])
def test_scratch_is_a_third_of_the_l2_cache_and_at_least_8_mib(l2_cache, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=l2_cache))
    assert triton_matmul.scratch_bytes.__wrapped__(CUDA) == expected


@pytest.mark.parametrize(("installed", "supported"), [("3.4.0", False), ("3.5.1", True), ("3.6.0+git", True),
                                                      ("3.10.0", True), ("2.3.1", False)])
def test_triton_before_3_5_is_refused(installed, supported, monkeypatch):
    monkeypatch.setattr(triton_matmul, "find_spec", lambda name: name)
    monkeypatch.setattr(triton_matmul, "version", lambda name: installed)
    monkeypatch.setattr(triton_matmul, "c_compiler", lambda: None)
    reason = triton_matmul.unavailable_reason.__wrapped__(CUDA)
    assert (installed in reason) is not supported


def test_table_takes_precedence_over_the_rule(tmp_path, monkeypatch):
    config = TileConfig(16, 128, 128, 2, 4, 5)
    entry = PROBLEM._asdict() | {"kernel": "skinny", "config": config._asdict()}
    (tmp_path / "sm_86.json").write_text(json.dumps({"entries": [entry]}), encoding="utf-8")
    monkeypatch.setenv("GPTQ_BELLE_TUNING", str(tmp_path))
    triton_config.tuned_plans.cache_clear()
    assert triton_config.tuned_plans(86) == {PROBLEM: LaunchPlan("skinny", config)}
    plan = triton_config.launch_plan.__wrapped__
    assert plan(PROBLEM, 86, 82) == LaunchPlan("skinny", config)
    assert plan(PROBLEM._replace(run=64), 86, 82) == triton_config.default_plan(PROBLEM._replace(run=64), 86, 82)
    (tmp_path / "sm_86.json").write_text(json.dumps({"entries": [entry | {"kernel": "fast"}]}), encoding="utf-8")
    triton_config.tuned_plans.cache_clear()
    with pytest.raises(ValueError, match=r"sm_86.json is not a table of tuned kernels.*'fast'"):
        triton_config.tuned_plans(86)
    triton_config.tuned_plans.cache_clear()
