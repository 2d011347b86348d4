"""Write a checkpoint with random weights in the shape of a real model, packed or in float16, without a download.

    python benchmarks/make_model.py belle-7b /tmp/belle-7b-4bit                       # 4 bit, groups of 128
    python benchmarks/make_model.py llama-7b /tmp/llama-8 --layers 8 --bits 8         # cut to 8 blocks
    python benchmarks/make_model.py belle-7b /tmp/belle-7b-small --head-bits 8        # packed lm_head only
    python benchmarks/make_model.py path/to/config.json /tmp/model --bits 16          # not quantized

The checkpoint serves measurements of speed and memory; it has no tokenizer. The packed words are random, which gives
uniform codes; scales keep the output of every linear about as large as its input, so that activations stay finite in
float16. The files are written sequentially in pieces of 16 MiB.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptq_belle.checkpoint.config_files import quantized_config
from gptq_belle.checkpoint.reader import read_config
from gptq_belle.checkpoint.safetensors_file import CHUNK_BYTES, TensorEntry, header_bytes
from gptq_belle.checkpoint.writer import SHARD_BYTES
from gptq_belle.formats.packed_lm_head import HEAD_CODES, HEAD_SCALES, head_group_size
from gptq_belle.formats.quantize_config import BITS
from gptq_belle.models.architectures import LM_HEAD
from gptq_belle.models.dimensions import Dimensions, dimensions
from gptq_belle.quantization.config import QuantConfig

EMBEDDING = 0.02  # standard deviation, as transformers initializes embeddings
BYTES = {"I32": 4, "F16": 2, "U8": 1}
# Random floats are random bytes that index 256 quantiles of the normal distribution. The look-up is twenty times as
# fast as sampling, which matters for the 2 GB of BLOOM's embedding.
QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)], np.float16)

Random = np.random.SFC64
Draw = Callable[[Random, int], NDArray[Any]]


class RandomTensor(NamedTuple):
    """A tensor to generate: its dtype as named by safetensors, its shape, and a function that generates elements."""

    dtype: str
    shape: tuple[int, ...]
    draw: Draw

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * BYTES[self.dtype]


def normal(deviation: float) -> Draw:
    """Normally distributed float16 with mean 0 and this standard deviation."""
    return looked_up(QUANTILES * np.float16(deviation))


def signed_scales(size: float) -> Draw:
    """Float16 scales from size / 2 to 1.5 size with random signs. There is one more code below the zero point than
    above it; random signs keep this offset from accumulating."""
    return looked_up(np.concatenate([sign * np.linspace(0.5, 1.5, 128) * size for sign in (1, -1)]).astype(np.float16))


def looked_up(table: NDArray[Any]) -> Draw:
    """Random entries of a table of 256."""
    return lambda random, count: table[octets(random, count)]


def words(random: Random, count: int) -> NDArray[Any]:
    """Random int32, directly from the bit generator: six times as fast as its distributions."""
    return random.random_raw(-(-count // 2)).view(np.int32)[:count]


def octets(random: Random, count: int) -> NDArray[Any]:
    """Random bytes."""
    return words(random, -(-count // 4)).view(np.uint8)[:count]


def constant(value: int | float, dtype: Any) -> Draw:
    """A constant."""
    return lambda random, count: np.full(count, value, dtype)


def group_index(inputs: int, size: int) -> Draw:
    """g_idx for groups in order; generated in one piece because it is small."""
    return lambda random, count: (np.arange(inputs) // size).astype(np.int32)


def packed(name: str, inputs: int, outputs: int, config: QuantConfig,
           gain: float) -> Iterator[tuple[str, RandomTensor]]:
    """Yield the tensors of one packed linear whose output is `gain` times as large as its input."""
    size = inputs if config.group_size == -1 else config.group_size
    groups, zero = math.ceil(inputs / size), 2 ** (config.bits - 1)
    stored = sum((zero - 1) << at for at in range(0, 32, config.bits))  # v1 stores zero points minus one
    spread = math.sqrt((4**config.bits - 1) / 12 + 0.25)  # of uniform codes around the zero point
    yield f"{name}.qweight", RandomTensor("I32", (inputs * config.bits // 32, outputs), words)
    yield f"{name}.qzeros", RandomTensor("I32", (groups, outputs * config.bits // 32), constant(stored, np.int32))
    yield f"{name}.g_idx", RandomTensor("I32", (inputs,), group_index(inputs, size))
    yield f"{name}.scales", RandomTensor("F16", (groups, outputs), signed_scales(gain / spread / math.sqrt(inputs)))


def packed_head(d: Dimensions, bits: int) -> Iterator[tuple[str, RandomTensor]]:
    """Yield the tensors of a packed lm_head (see `formats.packed_lm_head`)."""
    group = head_group_size(d.hidden_size)
    if group is None:
        raise SystemExit(f"a packed lm_head does not support a width of {d.hidden_size}")
    spread = math.sqrt((4**bits - 1) / 12)
    yield HEAD_CODES, RandomTensor("U8", (d.vocab_size, d.hidden_size * bits // 8), octets)
    yield HEAD_SCALES, RandomTensor("F16", (d.vocab_size, d.hidden_size // group), signed_scales(EMBEDDING / spread))


def tensors(d: Dimensions, config: QuantConfig | None) -> Iterator[tuple[str, RandomTensor]]:
    """Yield every tensor of a checkpoint with its name, in the model's order; `config` is None for float16."""
    arch = d.arch
    head = f"{arch.modules_before[0]}.weight" if d.tied else f"{LM_HEAD}.weight"
    for name, shape in d.arch.outer.items():
        if name == head and config is not None and config.head_bits != 16:
            yield from packed_head(d, config.head_bits)
            continue
        one = name.endswith("norm.weight") or name.endswith("ln_f.weight")
        yield name, RandomTensor("F16", shape, normal(EMBEDDING) if len(shape) == 2 else constant(int(one), np.float16))
    for block in range(d.num_layers):
        for name, shape in d.arch.vectors.items():
            value = int(name.endswith("norm.weight"))
            yield f"{arch.blocks}.{block}.{name}", RandomTensor("F16", shape, constant(value, np.float16))
        for linear, (inputs, outputs) in d.arch.shapes.items():
            name = f"{arch.blocks}.{block}.{linear}"
            into_residual = linear in (arch.stages[1][-1], arch.stages[3][-1])
            gain = 1 / math.sqrt(2 * d.num_layers) if into_residual else 1.0  # as GPT-2: bounds the residual sum
            if config is None:
                yield f"{name}.weight", RandomTensor("F16", (outputs, inputs), normal(gain / math.sqrt(inputs)))
            else:
                yield from packed(name, inputs, outputs, config, gain)


def shards(every: Mapping[str, RandomTensor], limit: int) -> list[dict[str, RandomTensor]]:
    """Split into files of at most `limit` bytes; each starts with its widest elements, so that all are aligned."""
    files: list[dict[str, RandomTensor]] = [{}]
    for name, tensor in every.items():
        if files[-1] and sum(t.size for t in files[-1].values()) + tensor.size > limit:
            files.append({})
        files[-1][name] = tensor
    return [dict(sorted(file.items(), key=lambda item: -BYTES[item[1].dtype])) for file in files]


def write(path: Path, content: Mapping[str, RandomTensor], random: Random) -> None:
    """Write one safetensors file, generating its tensors on the way."""
    with path.open("wb") as file:
        file.write(header_bytes({name: TensorEntry(t.dtype, t.shape, 0, t.size) for name, t in content.items()}))
        for name, tensor in content.items():
            count, piece = math.prod(tensor.shape), CHUNK_BYTES // BYTES[tensor.dtype]
            for begin in range(0, count, count if name.endswith("g_idx") else piece):
                file.write(tensor.draw(random, min(piece, count - begin)).data)


def make(model: str | Path, out: Path, *, bits: int = 4, group_size: int = 128, layers: int | None = None,
         context: int | None = None, head_bits: int = 16, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a model directory that `load` accepts.

    Args:
        model: a name of `models.belle_catalogue`, a config.json, or a directory with one.
        out: the directory; weights in it are replaced.
        bits: 2, 4 or 8; 16 writes float16 without quantization.
        group_size: inputs per group.
        layers, context: replace the configuration's number of blocks and longest context.
        head_bits: 8 or 4 stores the lm_head (for BLOOM also the embedding) only in packed form.
        seed: random seed of the weights.
        shard_bytes: size limit of a weight file.
    Returns:
        Bytes of the weight files.
    """
    plain = {key: value for key, value in read_config(model).items() if key != "quantization_config"}
    stated = {"n_layer": layers, "seq_length": context} if plain["model_type"] == "bloom" else {
        "num_hidden_layers": layers, "max_position_embeddings": context}
    plain |= {key: value for key, value in stated.items() if value is not None}
    d, config = dimensions(plain), None if bits == 16 else QuantConfig(
        bits=bits, group_size=group_size, method="rtn", head_bits=head_bits)
    out.mkdir(parents=True, exist_ok=True)
    files = shards(dict(tensors(d, config)), shard_bytes)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    names = ["model.safetensors"] if len(files) == 1 else [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    random = Random(seed)
    for name, content in zip(names, files, strict=True):
        write(out / name, content, random)
    total = sum(tensor.size for content in files for tensor in content.values())
    if len(files) > 1:
        where = {tensor: name for name, content in zip(names, files, strict=True) for tensor in content}
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    if config is None:
        _write_json(out / "config.json", plain | {"dtype": "float16", "torch_dtype": "float16"})
    else:
        _write_json(out / "config.json", quantized_config(plain, config.to_dict(), d.tied))
        _write_json(out / "quantize_config.json", config.to_dict())
    return sum((out / name).stat().st_size for name in names)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="belle-7b, llama-7b, llama-13b, a config.json, or a directory with one")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4, choices=(*(b for b in BITS if b != 3), 16))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--layers", type=int, help="number of blocks; default: all of the model")
    parser.add_argument("--context", type=int, help="longest context; default: that of the model")
    parser.add_argument("--head-bits", type=int, default=16, choices=(16, 8, 4), help="8 or 4 packs the lm_head")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    size = make(options.model, options.out, bits=options.bits, group_size=options.group_size, layers=options.layers,
                context=options.context, head_bits=options.head_bits, seed=options.seed)
    taken = time.perf_counter() - began
    print(f"{options.out}: {size / 1e9:.2f} GB in {taken:.1f} s, {size / taken / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
