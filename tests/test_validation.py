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
from gptq_belle.checkpoint.tokenizer_files import copy_tokenizer
from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.errors import GptqBelleError, InputError

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
    value = 0.25 if name.startswith("model.") else 0.0  # a head of another task is refused even if it has no effect
    path = edit(tiny_llama, {name: torch.full(shape, value)})
    assert_refused(path, tmp_path, name)


def test_biases_are_refused_where_the_configuration_lacks_the_keys(tiny_llama, tmp_path, edit):
    path = edit(tiny_llama, {Q_BIAS: torch.full((128,), 0.25)})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(
        {key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias")}))
    assert_refused(path, tmp_path, Q_BIAS)


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
    {"rope_scaling": {"full_attention": {"rope_theta": 5e5}}}, {"partial_rotary_factor": 0.5}, {"hidden_act": "gelu"},
    {"num_key_value_heads": 3}, {"layer_types": ["full_attention", "linear_attention"]}, {"mlp_bias": 0},
    {"tie_word_embeddings": "false"}, {"eos_token_id": 9999}, {"pad_token_id": "</s>"}, {"pad_token_id": 9999},
    {"dtype": "fp16"}, {"max_position_embeddings": None}])
def test_configurations_that_the_engine_cannot_run_are_refused(tiny_llama, tmp_path, edit, changes):
    config = json.loads((tiny_llama / "config.json").read_text())
    config.pop("rope_parameters", None)
    path = edit(tiny_llama)
    (path / "config.json").write_text(json.dumps(config | changes))
    named = [value for value in changes.values() if not isinstance(value, dict | list) and value != 9999]
    assert_refused(path, tmp_path, *(named or ["config.json" if "rope_scaling" not in changes else
                                               repr(next(iter(changes["rope_scaling"].values())))]))


@pytest.mark.parametrize("content", [
    "", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": 9999}', '{"do_sample": true, "top_p": "high"}',
    '{"do_sample": "true"}', '{"do_sample": true, "temperature": -1}', '{"repetition_penalty": NaN}',
    '{"watermarking_config": {"a": 1}}'])
def test_broken_generation_configs_are_refused(tiny_llama, tmp_path, edit, content):
    path = edit(tiny_llama, generation_config=content)
    with pytest.raises(InputError, match=naming("generation_config.json")) as caught:
        quantize_checkpoint(path, tmp_path / "out", RTN, device="cpu")
    assert "unexpected" not in str(caught.value)  # the word for faults of this program
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


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e6])
def test_values_that_cannot_be_written_are_refused_before_the_first_block(tiny_llama, tmp_path, edit, name, value):
    tensor = load_file(tiny_llama / "model.safetensors")[name].float()
    tensor.view(-1)[-1] = value
    path = edit(tiny_llama, {name: tensor})
    with pytest.raises(InputError, match=naming(name)) as caught:
        quantize_checkpoint(path, tmp_path / "out", RTN, device="cpu")
    assert list(tmp_path.glob("out*")) == []
    assert caught.value.cause in inspect(path).problems


def test_tensor_in_two_shards_is_refused(tiny_llama, tmp_path, edit):
    path = edit(tiny_llama)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    for file, names in (("a", list(tensors)), ("b", ["model.norm.weight"])):
        save_file({name: tensors[name] for name in names}, path / f"{file}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {name: "a.safetensors" for name in tensors} | {"model.norm.weight": "b.safetensors"}}))
    with pytest.raises(InputError, match=naming("model.norm.weight", "a.safetensors", "b.safetensors")):
        load(path, device="cpu")


def test_damaged_output_is_not_published(tiny_llama, tmp_path, monkeypatch):
    merge = CheckpointWriter.merge

    def damage(writer):
        merge(writer)
        tensors = load_file(writer.files / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.scales"][0, 0] = float("nan")
        save_file(tensors, writer.files / "model.safetensors")

    monkeypatch.setattr(CheckpointWriter, "merge", damage)
    with pytest.raises(GptqBelleError, match=naming("model.layers.1.mlp.down_proj.scales")):
        quantize_checkpoint(tiny_llama, tmp_path / "out", RTN, device="cpu")
    assert not (tmp_path / "out").exists()


def test_output_whose_tokenizer_differs_is_refused_before_the_first_block(tiny_llama, tmp_path, monkeypatch):
    def write(writer, *args):
        copy_tokenizer(writer, *args)
        file = writer.files / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))

    monkeypatch.setattr("gptq_belle.quantization.pipeline.copy_tokenizer", write)
    with pytest.raises(GptqBelleError, match=naming("tokenizer")):
        quantize_checkpoint(tiny_llama, tmp_path / "out", RTN, device="cpu")
    assert list(tmp_path.glob("out*")) == []


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


@pytest.mark.parametrize("stated_in", ["config.json", "quantize_config.json"])
def test_full_precision_weights_beside_packed_ones_are_refused(tiny_llama, tmp_path, stated_in):
    out = tmp_path / "out"
    quantize_checkpoint(tiny_llama, out, RTN, device="cpu")
    if stated_in == "quantize_config.json":  # as older programs write it: config.json is that of the full model
        shutil.copy(tiny_llama / "config.json", out)
    else:
        (out / "quantize_config.json").unlink()
    (out / "model.safetensors").rename(out / "gptq_model-8bit-32g.safetensors")
    torch.save(load_file(tiny_llama / "model.safetensors"), out / "pytorch_model.bin")
    with pytest.raises(InputError, match=naming(out)):
        load(out, device="cpu")
    assert inspect(out).problems


@st.composite
def configurations(draw):
    """A small configuration, some of them with something that the engine does not run."""
    kind, layers = draw(st.sampled_from(["bloom", "llama", "mistral", "qwen2"])), draw(st.integers(1, 2))
    common = {"model_type": kind, "vocab_size": 384, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2,
              "tie_word_embeddings": draw(st.booleans()), "pad_token_id": draw(st.sampled_from([None, 3, -1, 999]))}
    heads = draw(st.sampled_from([2, 4]))
    if kind == "bloom":
        return common | {"n_head": heads, "n_layer": layers, "seq_length": 128,
                         "apply_residual_connection_post_layernorm": draw(st.booleans())}
    return common | {
        "intermediate_size": draw(st.sampled_from([64, 96])), "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": draw(st.sampled_from([1, 2])),
        "attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["silu", "silu", "silu", "gelu"])), "max_position_embeddings": 128,
        "head_dim": draw(st.sampled_from([None, 32])), "sliding_window": draw(st.sampled_from([None, 64])),
        "use_sliding_window": draw(st.booleans()), "max_window_layers": 1,
        "rope_scaling": draw(st.sampled_from([
            None, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0},
            {"rope_type": "dynamic", "factor": 2.0},
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 32}]))}


FILES = [{}, {"generation_config": "{}"}, {"generation_config": '{"temperature": 0.6}'},
         {"generation_config": '{"eos_token_id": 999}'}, {"generation_config": ""},
         {"tokenizer_config": '{"tokenizer_class": "LLaMATokenizer", "eos_token": ""}'},
         {"tokenizer_config": '{"eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}'},
         {"tokenizer_config": '{"eos_token": "</s>", "chat_template": "{{ % }}"}'}, {"tokenizer": "{}"}]


@settings(max_examples=14, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configurations(), files=st.sampled_from(FILES), seed=st.integers(0, 99))
def test_any_configuration_runs_like_transformers_or_is_refused(tiny_llama, tmp_path_factory, config, files, seed):
    path = tmp_path_factory.mktemp("random")
    source, out = path / "source", path / "out"
    _save_random_model(config, seed, source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, source)
    for name, content in files.items():
        (source / f"{name}.json").write_text(content)
    refused = inspect(source).problems
    if refused:
        with pytest.raises(InputError) as caught:
            quantize_checkpoint(source, out, RTN, device="cpu")
        assert caught.value.cause in refused
        assert "unexpected" not in str(caught.value)
        assert list(path.glob("out*")) == []
        return
    quantize_checkpoint(source, out, RTN, device="cpu")
    assert inspect(out).problems == []
    model = gptq_belle.load(out, device="cpu", cache="float32", head_bits=16)
    model.generate("你好", prompt_style="auto", max_new_tokens=2)
    with torch.no_grad():
        expected = _dequantized(hf_model(out, device="cpu", dtype=torch.float32))(IDS).logits
    assert float((model.logits(IDS) - expected).abs().max() / expected.abs().max()) < 1e-4


def _save_random_model(config, seed, path):
    """Write a random model. What transformers itself refuses to build is only in config.json."""
    values = {key: value for key, value in config.items() if value is not None and key != "model_type"}
    torch.manual_seed(seed)
    built = values | ({"pad_token_id": None} if config["pad_token_id"] == 999 else {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **built)).float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.half().save_pretrained(path)
    (path / "config.json").write_text(json.dumps(
        json.loads((path / "config.json").read_text()) | {"pad_token_id": config["pad_token_id"]}))


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
