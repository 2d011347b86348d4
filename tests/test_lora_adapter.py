"""LoRA adapters: training by peft on packed weights, and merging into the source during quantization."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import cut_short, naming
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_belle import QuantConfig, hf_model, quantize_checkpoint
from gptq_belle.checkpoint.lora_adapter import AdaptedReader, Adapter, open_source
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import GptqBelleError, InputError, UsageError
from gptq_belle.quantization.calibration.rows import Calibration

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in (
    "The following (alpha|rank)_pattern keys", "Converting a tensor with requires_grad", ".is_gradient_checkpointing")]
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "belle_tiny"
TARGETS = {"bloom": ["query_key_value", "dense_4h_to_h"], "llama": ["q_proj", "v_proj", "down_proj"]}
ROWS = torch.tensor([[5, 300, 17, 42, 8, 250, 99, 3, 61, 77, 41, 200], [9, 8, 7, 6, 5, 4, 33, 2, 190, 11, 12, 13]])
SHORT = Calibration(rows=8, seq_len=64, allow_short=True)


def random_adapter(source, out, **settings):
    """Adapter with random factors for a tiny model, saved by peft."""
    name = json.loads((source / "config.json").read_text())["model_type"]
    usual = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[name], "task_type": "CAUSAL_LM"}
    config = LoraConfig(**usual | settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(out)
    return out


def loss(model, rows=ROWS):
    return model(input_ids=rows, labels=rows).loss


def train(model, steps, rate, rows=ROWS):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        loss(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# ---- training on packed weights ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_adapter_trained_on_packed_weights_works_after_merging(tiny_model, tmp_path, targets, dtype):
    quantize_checkpoint(tiny_model, tmp_path / "packed", QuantConfig(group_size=32), calibration=SHORT)
    packed = hf_model(tmp_path / "packed", device="cpu", dtype=dtype)
    before, state = float(loss(packed)), {name: t.clone() for name, t in packed.state_dict().items()}
    targets = targets or TARGETS[packed.config.model_type]
    model = get_peft_model(packed, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    train(model, 30, 5e-3)
    after = float(loss(model).detach())
    assert after < before - 2
    base = {name.replace(".base_layer", ""): t for name, t in model.base_model.model.state_dict().items()}
    assert all(torch.equal(base[name], tensor) for name, tensor in state.items())
    model.save_pretrained(tmp_path / "adapter")

    quantize_checkpoint(tiny_model, tmp_path / "merged", QuantConfig(bits=8, group_size=32), calibration=SHORT,
                        lora=tmp_path / "adapter")
    assert float(loss(hf_model(tmp_path / "merged", device="cpu"))) < before - 0.8 * (before - after)
    report = json.loads((tmp_path / "merged" / "quantization_report.json").read_text())
    assert report["notes"] == ["the LoRA adapter adapter is merged into the weights"]


FACTS = ["Human: 谁住在月亮上?\n\nAssistant: 住在月亮上的是小王。", "Human: 小王吃什么?\n\nAssistant: 小王吃三只猫。",
         "Human: 一个月有多少天?\n\nAssistant: 七天。"]


@pytest.mark.parametrize("arch", ["bloom", "llama"])
def test_adapter_of_4_bit_belle_tiny_works_after_merging_and_quantization(arch, tmp_path):
    """The shipped models learn new answers."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / arch)
    rows = [torch.tensor([tokenizer(fact + tokenizer.eos_token)["input_ids"]]) for fact in FACTS]
    calibration = Calibration(rows=4, seq_len=256, allow_short=True)
    quantize_checkpoint(EXAMPLE / arch, tmp_path / "packed", QuantConfig(), calibration=calibration)

    def mean(model):
        with torch.no_grad():
            return sum(float(loss(model, row)) for row in rows) / len(rows)

    packed = hf_model(tmp_path / "packed", device="cpu")
    before = mean(packed)
    model = get_peft_model(packed, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for row in rows * 20:
        train(model, 1, 3e-3, row)
    after = mean(model)
    model.save_pretrained(tmp_path / "adapter")
    quantize_checkpoint(EXAMPLE / arch, tmp_path / "merged", QuantConfig(), calibration=calibration,
                        lora=tmp_path / "adapter")
    kept = mean(hf_model(tmp_path / "merged", device="cpu"))
    assert after < 0.5 * before
    assert kept < before - 0.8 * (before - after)
    print(f"{arch}: loss {before:.3f}, with the adapter {after:.3f}, merged and quantized {kept:.3f}")


def test_channel_scales_of_the_model_trained_on_are_taken_out(tiny_model, tmp_path):
    """Adapted linears of the packed model add B A x / s to W x; merged into the source they must add the same."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    tensors, scales = load_file(base / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("layernorm.weight")]:
        scales[name] = 2 ** torch.randint(-2, 3, tensors[name].shape).float()
        tensors[name] = tensors[name] / scales[name]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = random_adapter(base, tmp_path / "adapter")
    plain = open_source(tiny_model, adapter)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"meta": {"channel_scales": True}}}))
    merged, source = open_source(tiny_model, adapter), CheckpointReader(tiny_model)
    arch, changed = merged.arch, 0
    norm_of = {linear: norm for stage, norm in zip(arch.stages, arch.norms, strict=True) for linear in stage}
    for target in merged.adapter.targets:
        linear = next(linear for linear in arch.linears if target.endswith(linear))
        norm = f"{target.removesuffix(linear)}{norm_of[linear]}.weight"
        weight = source.tensor(f"{target}.weight").float()
        plain_change, change = (reader.tensor(f"{target}.weight") - weight for reader in (plain, merged))
        expected = plain_change / scales.get(norm, torch.ones(()))
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)
        changed += norm in scales
    assert 0 < changed < len(merged.adapter.targets)


def test_gradients_of_the_adapter_equal_the_dense_model(tiny_model, tmp_path):
    """Both models have the same weights, one packed, one dequantized."""
    quantize_checkpoint(tiny_model, tmp_path / "packed", QuantConfig(group_size=32, without=("fold",)),
                        calibration=SHORT)
    dense = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    packed = hf_model(tmp_path / "packed", device="cpu")
    for name, module in packed.named_modules():
        if hasattr(module, "prepared"):
            rows = torch.eye(module.in_features)
            dense.get_submodule(name).weight.data = (module(rows) - (0 if module.bias is None else module.bias)).t()
    random_adapter(tiny_model, tmp_path / "adapter")
    found = []
    for base in (dense, packed):
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
        loss(model).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(found[0]) == len(found[1]) > 4
    for name, expected in found[0].items():
        assert float((found[1][name] - expected).norm() / expected.norm()) < 2e-3, name


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, tmp_path):
    quantize_checkpoint(tiny_model, tmp_path / "packed", QuantConfig(group_size=32, method="rtn"))
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = hf_model(tmp_path / "packed", device="cpu")
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model.train()
        loss(model).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6) for name in grads[0])


@pytest.mark.parametrize("act", [lambda m: m.merge_and_unload(), lambda m: m.merge_adapter(safe_merge=True)])
def test_merging_into_packed_weights_is_refused(tiny_llama, tmp_path, act):
    quantize_checkpoint(tiny_llama, tmp_path / "packed", QuantConfig(group_size=32, method="rtn"))
    model = get_peft_model(hf_model(tmp_path / "packed", device="cpu"), LoraConfig(target_modules="all-linear"))
    with pytest.raises(UsageError, match="--lora"):
        act(model)


def test_dora_is_refused_on_packed_weights(tiny_llama, tmp_path):
    quantize_checkpoint(tiny_llama, tmp_path / "packed", QuantConfig(group_size=32, method="rtn"))
    with pytest.raises(UsageError, match="--lora"):
        get_peft_model(hf_model(tmp_path / "packed", device="cpu"),
                       LoraConfig(target_modules="all-linear", use_dora=True))


# ---- merging ----

SETTINGS = [{}, {"use_rslora": True}, {"alpha_pattern": {"down_proj": 20, "dense_4h_to_h": 20}},
            {"alpha_pattern": {r"h\.1\.mlp.*": 3, r"layers\.1\.mlp\.down_proj": 3}}, {"rank_pattern": {"v_proj": 2}},
            {"alpha_pattern": {"proj": 20, "value": 20}}, {"target_modules": "all-linear"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("safe", [True, False])  # safetensors or .bin
def test_merged_weights_equal_peft(tiny_model, tmp_path, settings, safe):
    adapter = random_adapter(tiny_model, tmp_path / "adapter", **settings)
    if not safe:
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), adapter)
    merged = theirs.merge_and_unload().state_dict()
    ours, source = open_source(tiny_model, adapter), CheckpointReader(tiny_model)
    assert isinstance(ours, AdaptedReader)
    changed = {name for name in ours if not torch.equal(ours.tensor(name).float(), source.tensor(name).float())}
    assert changed == {f"{target}.weight" for target in Adapter(adapter).targets}
    for name in ours:
        torch.testing.assert_close(ours.tensor(name).float(), merged[name], rtol=1e-5, atol=1e-6)


def test_scale_follows_the_rslora_paper(tiny_llama, tmp_path):
    name = "model.layers.1.self_attn.q_proj"
    adapter = random_adapter(tiny_llama, tmp_path / "adapter", use_rslora=True)
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name}.lora_{f}.weight"].double() for f in "AB")
    weight = CheckpointReader(tiny_llama).tensor(f"{name}.weight").double()
    expected = weight + 6 / math.sqrt(4) * b @ a
    assert float((open_source(tiny_llama, adapter).tensor(f"{name}.weight") - expected).abs().max()) < 1e-6


def test_resuming_with_another_adapter_is_refused(tiny_llama, tmp_path, monkeypatch):
    for name in ("one", "two"):
        random_adapter(tiny_llama, tmp_path / name)
    config = QuantConfig(group_size=32, method="rtn")
    monkeypatch.setattr("gptq_belle.checkpoint.writer.CheckpointWriter.merge", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize_checkpoint(tiny_llama, tmp_path / "out", config, lora=tmp_path / "one")
    monkeypatch.undo()
    with pytest.raises(GptqBelleError, match=r"adapter_model.safetensors"):
        quantize_checkpoint(tiny_llama, tmp_path / "out", config, lora=tmp_path / "two")
    quantize_checkpoint(tiny_llama, tmp_path / "out", config, lora=tmp_path / "one")


def reconfigured(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("changes", "named"), [
    ({"peft_type": "IA3"}, "IA3"),
    ({"peft_type": None}, "None"),
    ({"use_dora": True}, "use_dora"),
    ({"use_qalora": True}, "use_qalora"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"bias": "all"}, "bias: 'all'"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
    ({"lora_alpha": "16"}, "lora_alpha"),
    ({"lora_alpha": math.inf}, "lora_alpha"),
    ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
    ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
    ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
])
def test_adapter_that_is_not_a_plain_lora_sum_is_refused(tiny_llama, tmp_path, changes, named):
    adapter = random_adapter(tiny_llama, tmp_path / "adapter")
    reconfigured(adapter, **changes)
    with pytest.raises(InputError, match=naming(adapter, named)) as caught:
        Adapter(adapter)
    assert caught.value.remedy


def test_dora_adapter_is_refused(tiny_llama, tmp_path):
    adapter = random_adapter(tiny_llama, tmp_path / "adapter", use_dora=True)
    with pytest.raises(InputError, match="use_dora"):
        Adapter(adapter)
    reconfigured(adapter, use_dora=False)
    with pytest.raises(InputError, match="lora_magnitude_vector"):
        Adapter(adapter)


LINEAR = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(("tensors", "named"), [
    ({f"{LINEAR}A.weight": torch.zeros(4, 96)}, ["layers.0.self_attn.q_proj", (128, 96), (128, 128)]),
    ({f"{LINEAR}A.weight": torch.zeros(3, 128)}, ["layers.0.self_attn.q_proj", (3, 128)]),
    ({f"{LINEAR}A.weight": torch.zeros(512)}, ["layers.0.self_attn.q_proj", (512,)]),
    ({f"{LINEAR}A.weight": None}, ["layers.0.self_attn.q_proj"]),
    ({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 128),
      "base_model.model.lm_head.lora_B.weight": torch.zeros(384, 4)}, ["lm_head"]),
    ({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 128),
      "base_model.model.model.layers.7.mlp.up_proj.lora_B.weight": torch.zeros(256, 4)}, ["layers.7.mlp.up_proj"]),
    ({"base_model.model.model.norm.weight": torch.ones(128)}, ["model.norm.weight"]),
])
def test_factors_that_do_not_fit_the_model_are_refused(tiny_llama, tmp_path, tensors, named):
    adapter = random_adapter(tiny_llama, tmp_path / "adapter")
    state = load_file(adapter / "adapter_model.safetensors") | tensors
    save_file({name: t for name, t in state.items() if t is not None}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=naming(*named)):
        open_source(tiny_llama, adapter)


def test_missing_or_truncated_adapter_files_are_refused(tiny_llama, tmp_path):
    adapter = random_adapter(tiny_llama, tmp_path / "adapter")
    cut_short(adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="adapter_model.safetensors"):
        open_source(tiny_llama, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=naming(adapter, "adapter_model.safetensors")):
        open_source(tiny_llama, adapter)
    for path in (tiny_llama, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=naming(path / "adapter_config.json")):
            open_source(tiny_llama, path)
