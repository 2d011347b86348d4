"""One validation of a model directory: quantize, load and inspect refuse the same directories before any work."""

import json
import shutil

import pytest
import torch
from conftest import naming
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import gptq_belle
from gptq_belle import QuantConfig, hf_model, load, quantize_checkpoint
from gptq_belle.checkpoint.config_files import repaired_generation_config
from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.errors import InputError

RTN = QuantConfig(bits=8, method="rtn", group_size=32)
IDS = torch.arange(5, 45).view(1, -1)


@pytest.fixture
def edit(tmp_path):
    """Copy a model with changed tensors and JSON files: edit(source, tensors=..., drop=..., **{"config.json": ...})."""

    def copy(source, tensors=None, drop=(), rename=lambda name: name, **files):
        path = tmp_path / "edited"
        shutil.copytree(source, path)
        kept = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if name not in drop}
        kept = {rename(name): tensor for name, tensor in (kept | (tensors or {})).items()}
        save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
        for name, changes in files.items():
            file = path / f"{name}.json"
            found = json.loads(file.read_text()) if file.is_file() else {}
            file.write_text(changes if isinstance(changes, str) else json.dumps(found | changes))
        return path

    return copy


def assert_refused(path, tmp_path, *named):
    """quantize, load and inspect refuse `path` for the same reason, and nothing is written."""
    out = tmp_path / "out"
    with pytest.raises(InputError, match=naming(*named)) as caught:
        quantize_checkpoint(path, out, RTN, device="cpu")
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
    with pytest.raises(InputError, match=naming(*named)):
        load(path, device="cpu")
    assert caught.value.cause in inspect(path).problems


Q_BIAS = "model.layers.1.self_attn.q_proj.bias"


@pytest.mark.parametrize(("name", "shape"), [
    (Q_BIAS, (128,)), ("model.layers.0.mlp.down_proj.bias", (128,)), ("v_head.summary.weight", (1, 128)),
    ("score.weight", (2, 128)), ("model.layers.0.self_attn.q_norm.weight", (32,)), ("model.layers.7.x.weight", (2,))])
def test_tensors_that_the_model_does_not_use_are_refused_by_name(tiny_llama, tmp_path, edit, name, shape):
    path = edit(tiny_llama, {name: torch.full(shape, 0.25)})
    stored = name if name.startswith("model.") else None
    assert_refused(path, tmp_path, stored or name)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", Q_BIAS])
def test_leftovers_without_effect_are_dropped_and_reported(tiny_llama, tmp_path, edit, name):
    path = edit(tiny_llama, {name: torch.zeros(128)})
    report = quantize_checkpoint(path, tmp_path / "out", RTN, device="cpu")
    assert any(name in note for note in report.notes)
    assert name not in load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(load(path, device="cpu").logits(IDS), load(tiny_llama, device="cpu").logits(IDS))


def test_masks_of_old_bloom_files_are_dropped(tiny_bloom, tmp_path, edit):
    path = edit(tiny_bloom, {"transformer.h.0.self_attention.masked_bias": torch.tensor(-1e4)})
    quantize_checkpoint(path, tmp_path / "out", RTN, device="cpu")
    assert torch.equal(load(path, device="cpu").logits(IDS), load(tiny_bloom, device="cpu").logits(IDS))


def test_stated_biases_are_kept(tiny_llama, tmp_path, edit):
    blocks, torch_state = 2, torch.Generator().manual_seed(0)
    names = {f"model.layers.{block}.self_attn.{part}_proj.bias": 64 if part in "kv" else 128
             for block in range(blocks) for part in "qkvo"}
    shapes = {name: load_file(tiny_llama / "model.safetensors")[name.replace("bias", "weight")].shape[0]
              for name in names}
    path = edit(tiny_llama, {name: torch.randn(size, generator=torch_state) / 4 for name, size in shapes.items()},
                config={"attention_bias": True})
    quantize_checkpoint(path, tmp_path / "out", RTN, device="cpu")
    source = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(IDS).logits
    found = load(tmp_path / "out", device="cpu").logits(IDS)
    assert torch.nn.functional.cosine_similarity(found, source, -1).min() > 0.99


@pytest.mark.parametrize("changes", [
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {"rope_scaling": {"type": "longrope", "factor": 4.0}},
    {"partial_rotary_factor": 0.5}, {"hidden_act": "gelu"}, {"num_key_value_heads": 3}])
def test_configurations_that_the_engine_cannot_run_are_refused(tiny_llama, tmp_path, edit, changes):
    config = json.loads((tiny_llama / "config.json").read_text())
    config.pop("rope_parameters", None)
    path = edit(tiny_llama)
    (path / "config.json").write_text(json.dumps(config | changes))
    named = [str(value) for value in changes.values() if not isinstance(value, dict)]
    assert_refused(path, tmp_path, *(named or [repr(next(iter(changes["rope_scaling"].values())))]))


@pytest.mark.parametrize("content", ["", "[1]", '{"eos_token_id": "x"}', '{"do_sample": true, "top_p": "high"}'])
def test_broken_generation_configs_are_refused(tiny_llama, tmp_path, edit, content):
    path = edit(tiny_llama, generation_config=content)
    with pytest.raises(InputError):
        quantize_checkpoint(path, tmp_path / "out", RTN, device="cpu")
    assert not (tmp_path / "out").exists()
    assert inspect(path).problems


@pytest.mark.parametrize(("stated", "change"), [
    ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True}),
    ({"do_sample": False, "top_k": 20}, {"do_sample": True}), ({"pad_token_id": -1}, {"pad_token_id": None})])
def test_generation_configs_that_cannot_be_saved_are_repaired(tiny_llama, tmp_path, edit, stated, change):
    path = edit(tiny_llama, generation_config=stated)
    quantize_checkpoint(path, tmp_path / "out", RTN, device="cpu")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: written.get(key) for key in change} == change
    hf_model(tmp_path / "out", device="cpu").save_pretrained(tmp_path / "copy")


def test_sound_generation_configs_stay_as_they_were(tmp_path):
    stated = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 3], "max_new_tokens": 100}
    assert repaired_generation_config(stated, tmp_path) == stated


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod."])
def test_prefixes_of_training_wrappers_are_named(tiny_model, tmp_path, edit, prefix):
    path = edit(tiny_model, rename=lambda name: prefix + name)
    assert_refused(path, tmp_path, repr(prefix))


def test_remedy_for_a_missing_lm_head_names_the_key(tiny_llama, edit, tmp_path):
    path = edit(tiny_llama, drop=["lm_head.weight"])
    with pytest.raises(InputError, match=naming("lm_head.weight", "tie_word_embeddings")):
        quantize_checkpoint(path, tmp_path / "out", RTN, device="cpu")
    with pytest.raises(InputError, match=naming("lm_head.weight", "tie_word_embeddings")):
        load(path, device="cpu")


def test_folder_of_links_is_quantized(tiny_llama, tmp_path):
    (tmp_path / "links").mkdir()
    for file in tiny_llama.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    quantize_checkpoint(tmp_path / "links", tmp_path / "out", RTN, device="cpu")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    load(tmp_path / "out", device="cpu")


def test_link_to_a_file_of_another_name_is_refused_before_the_job(tiny_llama, tmp_path, edit):
    path, secret = edit(tiny_llama), tmp_path / "secret"
    secret.write_text("{}")
    (path / "added_tokens.json").symlink_to(secret)
    with pytest.raises(InputError, match=naming(secret)):
        quantize_checkpoint(path, tmp_path / "out", RTN, device="cpu")
    assert not (tmp_path / "out").exists()


def test_full_precision_weights_beside_packed_ones_are_refused(tiny_llama, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(tiny_llama, out, RTN, device="cpu")
    (out / "model.safetensors").rename(out / "gptq_model-8bit-32g.safetensors")
    torch.save(load_file(tiny_llama / "model.safetensors"), out / "pytorch_model.bin")
    with pytest.raises(InputError, match=naming(out)):
        load(out, device="cpu")
    assert inspect(out).problems


@st.composite
def configurations(draw):
    """A small LLaMA-like configuration, some of them with something that the engine does not run."""
    heads = draw(st.sampled_from([2, 4]))
    return {
        "model_type": draw(st.sampled_from(["llama", "mistral", "qwen2"])), "vocab_size": 384, "hidden_size": 64,
        "intermediate_size": draw(st.sampled_from([64, 96])), "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads, "num_key_value_heads": draw(st.sampled_from([1, 2])),
        "tie_word_embeddings": draw(st.booleans()), "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()), "hidden_act": draw(st.sampled_from(["silu", "silu", "gelu"])),
        "max_position_embeddings": 128, "head_dim": draw(st.sampled_from([None, 32])),
        "rope_scaling": draw(st.sampled_from([None, {"rope_type": "linear", "factor": 2.0},
                                              {"rope_type": "yarn", "factor": 2.0}])),
        "bos_token_id": 1, "eos_token_id": 2}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configurations(), seed=st.integers(0, 99))
def test_any_configuration_runs_like_transformers_or_is_refused(tiny_llama, tmp_path_factory, config, seed):
    path = tmp_path_factory.mktemp("random")
    source, out = path / "source", path / "out"
    values = {key: value for key, value in config.items() if value is not None and key != "model_type"}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values)).float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.half().save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, source)
    refused = inspect(source).problems
    if refused:
        with pytest.raises(InputError) as caught:
            quantize_checkpoint(source, out, RTN, device="cpu")
        assert caught.value.cause in refused
        assert not out.exists()
        return
    quantize_checkpoint(source, out, RTN, device="cpu")
    reference = hf_model(out, device="cpu", dtype=torch.float32)
    logits = gptq_belle.load(out, device="cpu", cache="float32", head_bits=16).logits(IDS)
    with torch.no_grad():
        expected = _dequantized(reference)(IDS).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4


def _dequantized(model):
    """The model with its packed linears as plain ones in float32."""
    from gptq_belle.engine.linear import QuantLinear

    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            eye = torch.eye(module.in_features)
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            bias = torch.zeros(module.out_features) if module.bias is None else module.bias.float()
            plain.weight.data = (module(eye) - bias).T.contiguous()
            if module.bias is not None:
                plain.bias.data = bias
            model.set_submodule(name, plain)
    return model
