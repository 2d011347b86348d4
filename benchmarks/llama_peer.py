"""Run llama.cpp on a random Q4_0 model of LLaMA's shape in a separate process that answers timing requests.

The process imports neither torch nor gptq_belle, so it runs under any Python with llama-cpp-python and gguf (the
`peers` extra). GPTQ_BELLE_PEERS_PYTHON sets its interpreter; the default is that of the benchmark.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

PYTHON = "GPTQ_BELLE_PEERS_PYTHON"
CONTEXT = 2048  # tokens


class Shape(NamedTuple):
    """Dimensions of the model: those of LLaMA-7B, cut to 8 blocks."""

    blocks: int = 8
    width: int = 4096
    inner: int = 11008
    heads: int = 32
    vocabulary: int = 32000


class LlamaCpp:
    """The process of llama.cpp; a context manager that ends it."""

    def __init__(self, shape: Shape, threads: int) -> None:
        command = [os.environ.get(PYTHON, sys.executable), __file__, json.dumps(shape), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.version = self.process.stdout.readline().strip()

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    @property
    def available(self) -> bool:
        """Whether the process started; otherwise the reason is on stderr."""
        return bool(self.version)

    def seconds(self, context: int, rows: int, steps: int = 1) -> float:
        """Seconds of `steps` calls with `rows` tokens each, after `context` tokens."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{context} {rows} {steps}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"llama.cpp exited with code {self.process.wait()}; -4 is an illegal instruction. Built with gcc "
                     "12 for AMX, it loads an empty tile configuration (llama.cpp pull request 26954): apply that "
                     "fix, or build for another processor (CMAKE_ARGS, see its documentation)")
        return float(answer)


def serve(shape: Shape, threads: int) -> None:
    """Run in the process: print the version, then the seconds for every input line of (context, rows, steps)."""
    import gguf
    import llama_cpp

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "random.gguf"
        write_gguf(gguf, path, shape)
        model = llama_cpp.Llama(str(path), n_ctx=CONTEXT, n_batch=CONTEXT, n_ubatch=512, n_threads=threads,
                                n_threads_batch=threads, verbose=False)
    print(llama_cpp.__version__, flush=True)
    for line in sys.stdin:
        context, rows, steps = map(int, line.split())
        model.reset()
        if context:
            model.eval([1] * context)
        began = time.perf_counter()
        for _ in range(steps):
            model.eval([2] * rows)
        print(time.perf_counter() - began, flush=True)


def write_gguf(gguf: Any, path: Path, shape: Shape) -> None:
    """Write a LLaMA with random weights, all in Q4_0 including lm_head and embedding."""
    import numpy as np

    random = np.random.SFC64(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.blocks)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(shape.vocabulary)])
    writer.add_token_scores([0.0] * shape.vocabulary)
    writer.add_token_types([1] * shape.vocabulary)

    def packed(name: str, inputs: int, outputs: int) -> None:
        blocks = random.random_raw(-(-outputs * inputs // 32 * 18 // 8)).view(np.uint8)
        blocks = blocks[: outputs * inputs // 32 * 18].reshape(outputs, inputs // 32, 18)
        blocks[..., :2] = np.frombuffer(np.float16(0.2 / inputs**0.5).tobytes(), np.uint8)
        writer.add_tensor(name, blocks.reshape(outputs, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    packed("token_embd.weight", shape.width, shape.vocabulary)
    packed("output.weight", shape.width, shape.vocabulary)
    writer.add_tensor("output_norm.weight", np.ones(shape.width, np.float32))
    for i in range(shape.blocks):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            packed(f"blk.{i}.{name}.weight", shape.width, shape.width)
        packed(f"blk.{i}.ffn_gate.weight", shape.width, shape.inner)
        packed(f"blk.{i}.ffn_up.weight", shape.width, shape.inner)
        packed(f"blk.{i}.ffn_down.weight", shape.inner, shape.width)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(shape.width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    serve(Shape(*json.loads(sys.argv[1])), int(sys.argv[2]))
