"""Channel scales: the block's function stays, statistics are those of the new inputs, and norms are stored."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_belle import Calibration, QuantConfig, quantize_checkpoint
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.quantization.activations import InMemoryActivations
from gptq_belle.quantization.block_stream import BlockStream
from gptq_belle.quantization.channel_scales import fold_channel_scales
from gptq_belle.quantization.solver import factorize
from gptq_belle.quantization.stage_hessians import accumulate_hessians

BIAS_ROUNDING = 2**-11  # of float16
CALIBRATION = Calibration(rows=16, seq_len=64, allow_short=True)


@pytest.fixture
def uneven_model(tiny_model, tmp_path):
    """A tiny model whose norms have uneven weights, one of which is 0, and uneven biases."""
    out = shutil.copytree(tiny_model, tmp_path / "source")
    tensors = load_file(out / "model.safetensors")
    for name, value in tensors.items():
        if "layernorm" in name:
            tensors[name] = (value + 0.1 if name.endswith("bias") else value) * (2 * torch.randn_like(value)).exp()
        if name.endswith("layernorm.weight"):
            tensors[name][5] = 0
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def statistics(stream, block, stage, states):
    return accumulate_hessians(stream, block, stage, InMemoryActivations(states), None, len(states) - 1, lambda: None)


@pytest.mark.parametrize("place", [0, 2])
def test_the_function_stays_and_statistics_follow(uneven_model, place):
    stream = BlockStream(CheckpointReader(uneven_model), torch.device("cpu"))
    (states,) = stream.embed(torch.randint(4, 300, (32, 24)))
    block, stage, norm = stream.load_block(0), stream.arch.stages[place], stream.arch.norms[place]
    before, old = stream.run(block, states), block.get_parameter(f"{norm}.weight").detach().clone()
    hessian = statistics(stream, block, stage, states).hessian.clone()

    inputs = statistics(stream, block, stage, states)
    config = QuantConfig(group_size=32)
    found, factor = fold_channel_scales(block, norm, stage, inputs, factorize(inputs.hessian, config), config)
    assert torch.equal(factor.Hinv, factorize(found.hessian, config).Hinv)

    new = block.get_parameter(f"{norm}.weight").detach()
    assert torch.equal(new, new.half().float())
    assert found.scales[5] == 1  # the norm's weight is 0
    others = torch.arange(len(new)) != 5
    torch.testing.assert_close(found.scales[others], (old / new)[others], rtol=1e-6, atol=0)
    size = torch.where(hessian.diagonal() == 0, 1.0, hessian.diagonal()).double().sqrt() ** 0.3
    wanted = size / size.log().mean().exp()
    torch.testing.assert_close(found.scales[others].double(), wanted[others], rtol=2 * BIAS_ROUNDING, atol=0)

    bias = any(name == f"{norm}.bias" for name, _ in block.named_parameters())
    rounding = 8 * BIAS_ROUNDING if bias else 1e-5
    after = stream.run(block, states)
    assert (after - before).norm() < rounding * before.norm()
    again = statistics(stream, block, stage, states)
    assert (again.hessian - found.hessian).norm() < rounding * again.hessian.norm()
    assert (again.held_out[0][0] - found.held_out[0][0]).norm() < rounding * again.held_out[0][0].norm()


def test_scales_that_raise_the_rounding_error_are_not_used(uneven_model):
    """Weights on a grid that the group's scale gives exactly are rounded without error until they are scaled."""
    stream = BlockStream(CheckpointReader(uneven_model), torch.device("cpu"))
    (states,) = stream.embed(torch.randint(4, 300, (32, 24)))
    block, stage, norm = stream.load_block(0), stream.arch.stages[0], stream.arch.norms[0]
    for name in stage:
        weight = block.get_parameter(f"{name}.weight").data
        weight.copy_(torch.randint(-8, 8, weight.shape) / 64)
        weight[:, ::32] = -8 / 64
    inputs, config = statistics(stream, block, stage, states), QuantConfig(group_size=32)
    before = {name: value.clone() for name, value in block.named_parameters()}
    factor = factorize(inputs.hessian, config)
    assert fold_channel_scales(block, norm, stage, inputs, factor, config) == (inputs, factor)
    assert all(torch.equal(value, before[name]) for name, value in block.named_parameters())


def test_norms_are_stored_with_their_scales(uneven_model, tmp_path):
    source = load_file(uneven_model / "model.safetensors")
    for name, without in (("folded", ()), ("plain", ("fold",))):
        quantize_checkpoint(uneven_model, tmp_path / name, QuantConfig(group_size=32, without=without),
                            calibration=CALIBRATION)
    plain, folded = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "folded"))
    norms = [name for name in source if name.endswith("layernorm.weight") and ".0." in name]
    assert len(norms) == 2
    for name in norms:
        assert torch.equal(plain[name], source[name].half())
        assert not torch.equal(folded[name], plain[name])


def test_residual_connections_after_the_norm_forbid_scales(tiny_bloom, tmp_path):
    source = shutil.copytree(tiny_bloom, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"apply_residual_connection_post_layernorm": True}))
    quantize_checkpoint(source, tmp_path / "out", QuantConfig(group_size=32), calibration=CALIBRATION)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    for name in before:
        assert "layernorm" not in name or torch.equal(after[name], before[name].half())
