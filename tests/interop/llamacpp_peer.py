"""llama.cpp's converter: GGUF files of a GPTQ directory and of the same weights in full, compared tensor by tensor.

The vocabulary is left out: the converter knows the tokenizers of published models by their hash, not the demo models'.
LLAMA_CPP in the environment is a folder of llama.cpp with convert_hf_to_gguf.py and gguf-py. A job is
{"do": "weights", "path": DIR, "reference": DIR, "out": FOLDER}.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
from jobs import run

SOURCE = Path(os.environ["LLAMA_CPP"])
sys.path.insert(0, str(SOURCE / "gguf-py"))
CONVERT = """
import sys
sys.path[:0] = [".", "gguf-py"]
import convert_hf_to_gguf, conversion
from conversion import bloom, llama
for kind in (llama.LlamaModel, bloom.BloomModel):
    kind.set_vocab = lambda self: None
convert_hf_to_gguf.main()
"""


def tensors(path, out):
    from gguf import GGUFReader

    done = subprocess.run([sys.executable, "-c", CONVERT, path, "--outfile", out, "--outtype", "f32"],
                          cwd=SOURCE, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return {tensor.name: numpy.array(tensor.data) for tensor in GGUFReader(out).tensors}


def weights(job):
    found, expected = (tensors(job[key], f"{job['out']}-{key}.gguf") for key in ("path", "reference"))
    if found.keys() != expected.keys():
        raise ValueError(f"tensors differ: {sorted(found.keys() ^ expected.keys())}")
    wrong = [name for name, tensor in found.items() if not numpy.array_equal(tensor, expected[name])]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(found)} tensors differ, such as {wrong[0]}")
    return {"tensors": len(found)}


if __name__ == "__main__":
    run([], None, weights=weights)
