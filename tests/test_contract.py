"""Files that we write against the rules of those who read them (`contract`), and the table of docs/scale-out.md."""

import json
import re
import shutil
from pathlib import Path

import contract
import numpy as np
import pytest
import torch
from oracle_format import formula
from safetensors.torch import load_file, save_file

from gptq_belle import Calibration, QuantConfig, quantize_checkpoint
from gptq_belle.quantization.overrides import parse_override

Q_PROJ = "model.layers.0.self_attn.q_proj"
ROOT = Path(__file__).resolve().parent.parent
CALIBRATION = Calibration(rows=16, seq_len=64, allow_short=True)
DOWN = {"bloom": "dense_4h_to_h", "llama": "down_proj"}
JOBS = {
    "fast-4": {"preset": "fast"},
    "best-4": {},
    "fast-8": {"bits": 8, "preset": "fast"},
    "best-8": {"bits": 8},
    "asym": {"sym": False, "preset": "fast"},
    "act-order": {"act_order": True, "preset": "fast"},
    "rows": {"group_size": -1, "preset": "fast"},
    "override": {"preset": "fast", "overrides": ("DOWN=bits:8,group_size:64", r"\.1\.self_att.*=skip")},
    "three": {"bits": 3, "preset": "fast"},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The first two blocks of the demo models: wide enough to be divided between two ranks."""
    return {kind: first_blocks(ROOT / "examples" / "belle_tiny" / kind, tmp_path_factory.mktemp("source") / kind)
            for kind in DOWN}


def first_blocks(source, out):
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text("utf-8"))
    config["n_layer" if config["model_type"] == "bloom" else "num_hidden_layers"] = 2
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = load_file(out / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not re.search(r"\.(h|layers)\.[23]\.", name)}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def written(request, sources, tmp_path_factory):
    """A model, quantized; every job runs once."""
    kind, name = request.param
    settings = dict(JOBS[name])
    if "overrides" in settings:
        settings["overrides"] = tuple(
            parse_override(text.replace("DOWN", DOWN[kind])) for text in settings["overrides"])
    out = tmp_path_factory.mktemp(name) / kind
    quantize_checkpoint(sources[kind], out, QuantConfig(**settings), calibration=CALIBRATION)
    return contract.Files(out)


def jobs(*names):
    return pytest.mark.parametrize("written", [(kind, name) for kind in DOWN for name in names], indirect=True,
                                   ids=lambda value: "-".join(value))


@jobs(*JOBS)
def test_names_types_shapes_zero_points_and_groups(written):
    assert contract.layout(written) == []
    assert contract.gptqmodel(written) == []


@jobs("fast-4", "best-4", "fast-8", "best-8", "rows", "override")
@pytest.mark.parametrize("ranks", [1, 2])
def test_vllm_and_sglang_take_the_standard_files(written, ranks):
    assert contract.vllm(written, ranks) == []


@jobs("asym", "three")
def test_documented_formats_are_refused_by_vllm(written):
    assert len(contract.vllm(written, 1)) == len(written.linears())


@jobs("act-order")
def test_act_order_is_declared(written):
    assert contract.vllm(written, 1) == ["desc_act"]
    assert any(np.any(np.diff(written.array(f"{linear.name}.g_idx")) < 0) for linear in written.linears())


@jobs("fast-4", "best-8", "act-order")
def test_auto_gptq_and_transformers_take_one_setting_in_v1(written):
    assert contract.auto_gptq(written) == []


@jobs("override")
def test_dynamic_rules_describe_the_tensors(written):
    seen = {(linear.bits, linear.group) for linear in written.linears()}
    assert seen == {(4, 128), (8, 64)}
    left = [name for names, _, _ in written.stages() for name in names if f"{name}.weight" in written.header]
    assert {name.split(".self_att")[0][-2:] for name in left} == {".1"}


@jobs("fast-4", "best-8", "asym", "act-order")
def test_packed_words_reproduce_the_weights(written, sources):
    """A word read in a wrong order leaves no likeness."""
    source = load_file(sources[written.config["model_type"]] / "model.safetensors")
    for linear in written.linears()[:4]:
        parts = [torch.from_numpy(written.array(f"{linear.name}.{part}").copy())
                 for part in ("qweight", "qzeros", "scales", "g_idx")]
        weight = formula(*parts, linear.bits, v1=written.stated["format"] == "gptq").numpy()
        likeness = np.corrcoef(weight.ravel(), source[f"{linear.name}.weight"].double().numpy().ravel())[0, 1]
        assert likeness > 0.95, linear


CHANGES = {
    "sym": (lambda tensors, stated: stated.update(sym=False), contract.gptqmodel, "asymmetric and v1"),
    "group": (lambda tensors, stated: stated.update(group_size=64), contract.layout, "expected"),
    "method": (lambda tensors, stated: stated.update(quant_method="GPTQ"), contract.layout, "quant_method is GPTQ"),
    "format": (lambda tensors, stated: stated.update(format="gptq_v2"), contract.layout, "stored as 77777777"),
    "g_idx": (lambda tensors, stated: tensors.update({f"{Q_PROJ}.g_idx": torch.arange(255, -1, -1).int() // 128}),
              contract.layout, "g_idx is not k // g"),
    "scales": (lambda tensors, stated: tensors.update({f"{Q_PROJ}.scales": tensors[f"{Q_PROJ}.scales"].float()}),
               contract.layout, "F32"),
    "lost": (lambda tensors, stated: tensors.pop(f"{Q_PROJ}.g_idx"), contract.layout, "expected"),
    "fused": (lambda tensors, stated: stated.update(dynamic={"-:.*q_proj": {}}), contract.layout, "different settings"),
    "bits": (lambda tensors, stated: stated.update(dynamic={"+:.*q_proj": {"bits": 2}}), contract.vllm, "2 bits"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("written", [("llama", "fast-4")], indirect=True, ids=["llama"])
def test_reader_rules_detect_violations(written, tmp_path, name):
    change, rule, words = CHANGES[name]
    shutil.copytree(written.path, tmp_path, dirs_exist_ok=True)
    tensors, stated = load_file(tmp_path / "model.safetensors"), dict(written.stated)
    change(tensors, stated)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for file, content in (("config.json", written.config | {"quantization_config": stated}),
                          ("quantize_config.json", stated)):
        (tmp_path / file).write_text(json.dumps(content), "utf-8")
    files = contract.Files(tmp_path)
    found = rule(files, 1) if rule is contract.vllm else rule(files)
    assert any(words in problem for problem in found), found


SIZES = {  # hidden, feed-forward's inner size, heads
    "BELLE-7B (BLOOM)": ("bloom", 4096, 16384, 32),
    "BELLE-LLaMA-7B": ("llama", 4096, 11008, 32),
    "BELLE-LLaMA-13B": ("llama", 5120, 13824, 40),
}


@pytest.mark.parametrize("model", SIZES)
def test_documented_tensor_parallel_sizes_are_right(model):
    kind, hidden, inner, heads = SIZES[model]
    fused = [(hidden, 3 * hidden)] if kind == "bloom" else [(hidden, hidden)] * 3
    column, row = [*fused, (hidden, inner)], [(hidden, hidden), (inner, hidden)]
    possible = [ranks for ranks in (1, 2, 4, 8, 16, 32) if heads % ranks == 0
                and not any(contract.split(*shape, 128, False, ranks) for shape in column)
                and not any(contract.split(*shape, 128, True, ranks) for shape in row)]
    text = (ROOT / "docs" / "scale-out.md").read_text("utf-8")
    row_of = re.search(rf"^\| {re.escape(model)} \| (.*) \|$", text, re.MULTILINE)
    assert row_of[1] == ", ".join(map(str, possible))
