"""What the readers of GPTQ checkpoints need, written from the format's description alone: no code of the package.

A directory is read with json and NumPy. Every function returns what is wrong, as text; nothing where all is well.
K = in_features, N = out_features, g = group size, G = ceil(K / g), f = 32 / bits.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex

DTYPES = {"I32": np.int32, "F16": np.float16}
STAGES = {  # by model_type: linears that see the same input, whether each rank holds a part of their inputs, fused name
    "bloom": ((("self_attention.query_key_value",), False, None), (("self_attention.dense",), True, None),
              (("mlp.dense_h_to_4h",), False, None), (("mlp.dense_4h_to_h",), True, None)),
    "llama": ((("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), False, "self_attn.qkv_proj"),
              (("self_attn.o_proj",), True, None), (("mlp.gate_proj", "mlp.up_proj"), False, "mlp.gate_up_proj"),
              (("mlp.down_proj",), True, None)),
}
BLOCKS = {"bloom": "transformer.h", "llama": "model.layers"}
SYMMETRIC_WORDS = {("gptq", 4): 0x77777777, ("gptq_v2", 4): 0x88888888, ("gptq", 8): 0x7F7F7F7F,
                   ("gptq_v2", 8): 0x80808080}
NEEDED = ("bits", "group_size", "desc_act", "sym")
MARLIN_GROUPS, MARLIN_INPUTS, MARLIN_OUTPUTS = (-1, 32, 64, 128), 128, 64


class Linear(NamedTuple):
    """A quantized linear as the files have it."""

    name: str
    fused: str | None
    row_parallel: bool
    bits: int
    group: int
    sym: bool
    inputs: int
    outputs: int


class Files:
    """A checkpoint directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = json.loads((path / "config.json").read_text("utf-8"))
        self.stated = self.config["quantization_config"]
        data = (path / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        self.header = json.loads(data[8 : 8 + length])
        self.metadata = self.header.pop("__metadata__", {})
        self._data = data[8 + length :]

    def array(self, name: str) -> np.ndarray:
        entry = self.header[name]
        begin, end = entry["data_offsets"]
        return np.frombuffer(self._data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def stages(self):
        kind = self.config["model_type"]
        for block in range(self.config.get("num_hidden_layers") or self.config["n_layer"]):
            prefix = f"{BLOCKS[kind]}.{block}."
            for names, row_parallel, fused in STAGES[kind]:
                yield [prefix + name for name in names], row_parallel, fused and prefix + fused

    def linears(self) -> list[Linear]:
        """Those that ``dynamic`` does not exclude, with what it sets."""
        found = []
        for names, row_parallel, fused in self.stages():
            for name in names:
                if (values := dynamic(self.stated, name)) is None:
                    continue
                settings = self.stated | values
                rows, outputs = self.header[f"{name}.qweight"]["shape"]
                bits = settings["bits"]
                found.append(Linear(name, fused, row_parallel, bits, settings["group_size"], settings["sym"],
                                    rows * 32 // bits, outputs))
        return found


def dynamic(stated: dict, name: str, match=re.match) -> dict | None:
    """What ``dynamic`` sets for a linear: the first key that matches from the start of its name; None excludes it."""
    for key, values in stated.get("dynamic", {}).items():
        if match(key.removeprefix("-:").removeprefix("+:"), name):
            return None if key.startswith("-:") else values
    return {}


def layout(files: Files) -> list[str]:
    """Names, dtypes, shapes, zero points and groups of the tensors, and the files around them."""
    wrong = [f"{name} is missing" for name in ("quantize_config.json", "generation_config.json", "tokenizer.json",
                                               "tokenizer_config.json") if not (files.path / name).is_file()]
    if "chat_template" not in json.loads((files.path / "tokenizer_config.json").read_text("utf-8")):
        wrong.append("there is no chat template")
    if json.loads((files.path / "quantize_config.json").read_text("utf-8")) != files.stated:
        wrong.append("quantize_config.json says something else than config.json")
    if files.metadata.get("format") != "pt":
        wrong.append("model.safetensors does not say format pt")
    expected = {"quant_method": "gptq", "pack_dtype": "int32", "lm_head": False,
                "checkpoint_format": files.stated.get("format")}
    wrong += [f"{key} is {files.stated.get(key)}" for key, value in expected.items() if files.stated.get(key) != value]
    wrong += [f"{key} is missing" for key in NEEDED if key not in files.stated]
    if files.config.get("tie_word_embeddings") and "lm_head.weight" in files.header:
        wrong.append("a tied lm_head.weight is written")
    packed = {linear.name for linear in files.linears()}
    wrong += [f"{name} is {entry['dtype']}" for name, entry in files.header.items()
              if name.rpartition(".")[0] not in packed and entry["dtype"] != "F16"]
    for linear in files.linears():
        wrong += [f"{linear.name}: {problem}" for problem in _linear(files, linear)]
    return wrong + _shared(files)


def _linear(files: Files, linear: Linear) -> list[str]:
    inputs, outputs, bits = linear.inputs, linear.outputs, linear.bits
    size = inputs if linear.group == -1 else linear.group
    groups = math.ceil(inputs / size)
    parts = {"qweight": ("I32", [inputs * bits // 32, outputs]), "qzeros": ("I32", [groups, outputs * bits // 32]),
             "scales": ("F16", [groups, outputs]), "g_idx": ("I32", [inputs])}
    if files.config["model_type"] == "bloom":
        parts["bias"] = ("F16", [outputs])
    found = {name.rpartition(".")[2]: (entry["dtype"], entry["shape"]) for name, entry in files.header.items()
             if name.rpartition(".")[0] == linear.name}
    if found != parts:
        return [f"tensors are {found}, expected {parts}"]
    wrong = []
    g_idx = files.array(f"{linear.name}.g_idx")
    regular = np.arange(inputs) // size
    if not files.stated["desc_act"] and not np.array_equal(g_idx, regular):
        wrong.append("g_idx is not k // g, without desc_act")
    if not np.array_equal(np.sort(g_idx), regular):
        wrong.append("g_idx does not fill every group")
    zeros = files.array(f"{linear.name}.qzeros").view(np.uint32)
    if linear.sym and bits in (4, 8) and not np.all(zeros == SYMMETRIC_WORDS[files.stated["format"], bits]):
        wrong.append(f"symmetric zero points are stored as {zeros.flat[0]:08X}")
    if not np.isfinite(files.array(f"{linear.name}.scales")).all():
        wrong.append("scales are not finite")
    return wrong


def _shared(files: Files) -> list[str]:
    """Linears that readers run as one share bits, groups and order, and the name of the fused one is matched alike."""
    wrong = []
    for names, _, fused in files.stages():
        for match in (re.match, regex.match):
            settings = [dynamic(files.stated, name, match) for name in (*names, *([fused] if fused else []))]
            if any(other != settings[0] for other in settings):
                wrong.append(f"{names} and {fused} have different settings: {settings}")
        orders = [files.array(f"{name}.g_idx") for name in names if f"{name}.g_idx" in files.header]
        if any(not np.array_equal(order, orders[0]) for order in orders):
            wrong.append(f"{names} have different groups")
    return wrong


def vllm(files: Files, ranks: int) -> list[str]:
    """vLLM's Marlin kernels, and SGLang's, with this number of tensor-parallel ranks."""
    heads = files.config.get("num_attention_heads") or files.config["n_head"]
    wrong = [f"{heads} heads for {ranks} ranks"] if heads % ranks else []
    if files.stated["desc_act"] and files.stated["group_size"] != -1:
        wrong.append("desc_act")
    for linear in files.linears():
        if linear.bits not in (4, 8) or not linear.sym:
            wrong.append(f"{linear.name}: {linear.bits} bits, sym {linear.sym}")
        wrong += [f"{linear.name}: {problem}" for problem in
                  split(linear.inputs, linear.outputs, linear.group, linear.row_parallel, ranks)]
    return wrong


def split(inputs: int, outputs: int, group: int, row_parallel: bool, ranks: int) -> list[str]:
    """What keeps a linear from being divided between ranks: of the inputs where `row_parallel`, else of the outputs."""
    divided = inputs if row_parallel else outputs
    if divided % ranks:
        return [f"{divided} for {ranks} ranks"]
    inputs, outputs = (inputs // ranks, outputs) if row_parallel else (inputs, outputs // ranks)
    wrong = [] if group in MARLIN_GROUPS else [f"group size {group}"]
    wrong += [f"{inputs} inputs"] if inputs % MARLIN_INPUTS or (group != -1 and inputs % group) else []
    return wrong + ([f"{outputs} outputs"] if outputs % MARLIN_OUTPUTS else [])


def gptqmodel(files: Files) -> list[str]:
    """GPTQModel refuses v1 files of other producers whose zero points are not symmetric."""
    plain = all(linear.sym for linear in files.linears())
    return [] if plain or files.stated["format"] == "gptq_v2" else ["asymmetric and v1"]


def auto_gptq(files: Files) -> list[str]:
    """AutoGPTQ 0.7 knows v1 alone, and one setting for all linears; so does transformers with optimum."""
    wrong = [] if files.stated["format"] == "gptq" else [f"format {files.stated['format']}"]
    return wrong + (["dynamic"] if files.stated.get("dynamic") else [])
