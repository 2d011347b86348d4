"""plan: sizes against the layouts that the kernels really make, and the search for what fits."""

import json

import pytest
import torch

from gptq_belle.bench import plan
from gptq_belle.bench.plan import best_fit
from gptq_belle.errors import UsageError
from gptq_belle.kernels import cpu_layout, triton_layout
from gptq_belle.kernels.layout import checked_weight
from gptq_belle.kernels.native_library import load_library
from gptq_belle.models.belle_catalogue import CONFIGS
from gptq_belle.models.dimensions import LinearShape, dimensions
from gptq_belle.models.sizes import MemorySettings, MemoryUse, cache_bytes, matrix_bytes, memory_use

GIB = 1 << 30
BELLE = dimensions(CONFIGS["belle-7b"])
CASES = [(256, 96, 4, 128), (256, 100, 4, 64), (192, 32, 8, 32), (384, 160, 8, 128), (256, 64, 2, 128),
         (256, 64, 3, 128), (256, 64, 4, -1), (320, 64, 4, 128)]


def weight(inputs, outputs, bits, group):
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    columns = -(-outputs * bits // 32)
    return checked_weight(torch.randint(-(2**31), 2**31 - 1, (inputs * bits // 32, outputs), dtype=torch.int32),
                     torch.zeros(groups, columns, dtype=torch.int32), torch.rand(groups, outputs).half(),
                     torch.arange(inputs, dtype=torch.int32) // size, bits, 1)


def held(prepared):
    return sum(value.nbytes for value in prepared if isinstance(value, torch.Tensor))


@pytest.mark.skipif(isinstance(load_library(), str), reason="no compiled kernels")
@pytest.mark.parametrize("case", CASES)
def test_packed_sizes_are_those_of_the_cpu_layout(case):
    inputs, outputs, bits, group = case
    if outputs * bits % 32:
        outputs += 32 - outputs % 32  # words of zero points are whole
    found = matrix_bytes(LinearShape(inputs, outputs), bits, MemorySettings(group_size=group))
    assert found == held(cpu_layout.prepare(weight(inputs, outputs, bits, group)))


@pytest.mark.parametrize("case", CASES)
def test_packed_sizes_are_those_of_the_gpu_layout(case):
    inputs, outputs, bits, group = case
    outputs = -(-outputs // 32) * 32
    found = matrix_bytes(LinearShape(inputs, outputs), bits, MemorySettings(group_size=group, device="cuda"))
    assert found == held(triton_layout.prepare(weight(inputs, outputs, bits, group)))


def test_plan_of_belle_7b_equals_hand_computation():
    found = memory_use(BELLE, MemorySettings(bits=4, head_bits=8), 2048, 1)
    weights = 30 * (4096 * 12288 + 4096 * 4096 + 2 * 4096 * 16384)
    assert found.blocks == pytest.approx(weights * (0.5 + 2 / 128), rel=0.004)  # the rest: norms, biases, g_idx
    assert found.head == pytest.approx(250880 * 4096 * (1 + 2 / 128), rel=0.002)
    assert found.cache == 2 * 30 * 4096 * 2 * 2048
    assert cache_bytes(BELLE, "int8", 2048, 3) == 3 * 2048 * 2 * 30 * (4096 + 2 * 32)


def test_an_untied_head_comes_on_top_of_the_embedding():
    llama = dimensions(CONFIGS["llama-7b"])
    found = memory_use(llama, MemorySettings(bits=4, head_bits=4), 16, 1).head
    assert found == pytest.approx(32000 * 4096 * (2 + 0.5 + 2 / 128), rel=0.002)


@pytest.mark.parametrize("batch", [1, 5])
def test_the_longest_context_fits_and_one_more_token_does_not(batch):
    memory = (5 + batch // 5) * 10**9
    rows = plan.plan(CONFIGS["belle-7b"], memory, batch=batch)
    between = [row for row in rows if 0 < row.longest_context < 2048]
    assert between
    for row in between:
        assert memory_use(BELLE, row.settings, row.longest_context, batch).total <= memory
        assert memory_use(BELLE, row.settings, row.longest_context + 1, batch).total > memory
    for row in rows:
        assert row.fits == (row.use.total <= memory) == (row.longest_context == 2048)


def test_the_best_has_the_most_bits_of_what_fits():
    rows = plan.plan(CONFIGS["belle-7b"], 9 * GIB)
    assert (best_fit(rows).settings.bits, best_fit(rows).settings.head_bits) == (8, 8)
    assert best_fit(plan.plan(CONFIGS["belle-7b"], 4 * GIB)) is None


def test_a_packed_model_is_planned_with_its_own_bits():
    config = CONFIGS["llama-7b"] | {"quantization_config": {"bits": 8, "group_size": 32}}
    rows = plan.plan(config, 8 * GIB)
    assert {(row.settings.bits, row.settings.group_size) for row in rows} == {(8, 32)}


@pytest.mark.parametrize(("hidden", "group"), [(4096, 128), (576, 64), (544, 32), (4100, -1)])
def test_automatic_group_size_divides_all_inputs(hidden, group):
    config = CONFIGS["llama-7b"] | {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": 1,
                                    "num_key_value_heads": 1, "head_dim": hidden}
    rows = plan.plan(config, GIB, group_size="auto")
    assert {row.settings.group_size for row in rows} == {group}


@pytest.mark.parametrize("wrong", [{"context": 4096}, {"context": 0}, {"batch": 0}, {"cache": "int2"}])
def test_impossible_workloads_are_refused(wrong):
    with pytest.raises(UsageError):
        plan.plan(CONFIGS["belle-7b"], GIB, **wrong)


def test_plan_command(belle):
    code, out, _ = belle("plan", "belle-7b", "--memory", "8.2GB", "--device", "cpu")
    assert code == 0
    assert "Fits with 8-bit weights and a head of 4 bits" in out
    assert "choose --context" in belle("plan", "belle-7b", "--memory", "5.0GB", "--device", "cpu")[1]
    nothing_fits = belle("plan", "belle-7b", "--memory", "2GiB", "--device", "cpu")[1]
    assert "Does not fit at any setting: 4-bit weights" in nothing_fits
    code, _, err = belle("plan", "no-such", "--memory", "8GiB")
    assert code == 4
    assert "no-such" in err
    assert belle("plan", "belle-7b", "--memory", "many")[0] == 2


def test_plan_command_as_json(belle, tiny_llama):
    found = json.loads(belle("plan", str(tiny_llama), "--memory", "1GiB", "--json", "--device", "cpu")[1])
    assert found["best"]["bits"] == 16
    row = found["rows"][0]
    parts = ("program", "blocks", "head", "cache", "workspace")
    assert row["total_bytes"] == sum(row[f"{part}_bytes"] for part in parts)


def test_parts_add_up():
    assert (MemoryUse(1, 2, 3, 4, 5).model, MemoryUse(1, 2, 3, 4, 5).total) == (14, 15)
