"""Small checkpoints and what a hostile or unlucky hand makes of them: bytes, safetensors headers, JSON values, tensors.

Run as a program, the other side of `Worker`: it opens one directory a line and says what came of it.
"""

import contextlib
import json
import os
import random
import resource
import selectors
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60  # for one directory; the slowest takes well below one
ADDRESS_SPACE = 12 << 30  # a size that is believed and allocated shows as a failed allocation
VALUES = (None, True, False, -1, 0, 1, 3, 7, 1 << 16, 1 << 31, (1 << 63) - 1, 1 << 64, 10**30, -1.5, 1e308,
          float("nan"), float("inf"),
          "", "x", "../../etc/passwd", "/dev/zero", "\0", "\ud800", "gptq", "true", "os.system", [], [[]],
          [0], ["x"], {}, {"": {}}, [1 << 62] * 3, "F16", "I32", "attacker/kernel")


def byte_level(rng, data):
    """Change the bytes of a file: flip, truncate, duplicate, remove, or overwrite with extreme values."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if not data:
            break
        at = rng.randrange(len(data)) if rng.random() < 0.6 else rng.randrange(min(len(data), 64))
        span = rng.choice((1, 2, 8, 64, len(data)))
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + span]
            case 3:
                data[at:at] = data[at : at + span]
            case 4:
                data[at : at + 8] = rng.choice((0, 1, 255, 1 << 31, (1 << 63) - 1, (1 << 64) - 1)).to_bytes(8, "little")
            case 5:
                data[at : at + span] = rng.randbytes(min(span, len(data) - at))
    return bytes(data)


def json_level(rng, value):
    """Change a JSON value: replace, remove or duplicate some of its parts."""
    if rng.random() < 0.03:
        return rng.choice(VALUES)
    place, key = value, None
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        inner = rng.choice(keys)
        if key is not None and rng.random() < 0.3:
            break
        above, key, place = place, inner, place[inner]
    if key is None:
        return rng.choice(VALUES)
    match rng.randrange(5):
        case 0:
            del above[key]
        case 1 if isinstance(above[key], int) and not isinstance(above[key], bool):
            above[key] += rng.choice((-1, 1, 2, 8, 32, -32, 4096))
        case 2 if isinstance(above, dict):
            moved = above.pop(key)
            above[rng.choice([*above, "renamed"])] = moved
        case _:
            above[key] = rng.choice(VALUES)
    return value


def header_level(rng, data):
    """Change the header of a safetensors file as JSON, mostly with a correct length."""
    size = int.from_bytes(data[:8], "little")
    header = json_level(rng, json.loads(data[8 : 8 + size]))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = b"[" * rng.choice((100, 100_000)) + text
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) - 1, 1 << 40, (1 << 64) - 1))
    return length.to_bytes(8, "little") + text + data[8 + size :]


def tensor_level(rng, path):
    """Change tensors of a valid file: values, shapes, dtypes or names."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    match rng.randrange(7):
        case 0:
            del tensors[name]
        case 1:
            tensors[name] = tensor.to(rng.choice((torch.float32, torch.int8, torch.bool, torch.float64, torch.int64)))
        case 2:
            tensors[name] = tensor.flatten()[: rng.randrange(tensor.numel() + 1)].clone()
        case 3 if tensor.is_floating_point():
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf"), -65504.0))
        case 3 | 4:
            extremes = torch.tensor([-1, 1 << 30, -(1 << 31), 7], dtype=torch.int64)
            tensor.view(-1)[rng.randrange(tensor.numel())] = extremes[rng.randrange(4)].to(tensor.dtype)
        case 5:
            tensors[name] = tensor.unsqueeze(0).contiguous() if rng.random() < 0.5 else tensor.t().contiguous()
        case 6:
            tensors[rng.choice(("x", name + ".bias", "lm_head.qweight", "../x"))] = tensor.clone()
    save_file(tensors, path)


def mutate(rng, directory):
    """Mutate one file of a directory."""
    weights = [file for file in directory.iterdir() if file.suffix in (".safetensors", ".bin")]
    texts = [file for file in directory.iterdir() if file.suffix == ".json"]
    kind = rng.randrange(10)
    if kind < 3:
        file = rng.choice(weights + weights + texts)
        file.write_bytes(byte_level(rng, file.read_bytes()))
    elif kind < 6:
        file = rng.choice([file for file in texts if file.name != "tokenizer.json"] * 3 + texts)
        file.write_text(json.dumps(json_level(rng, json.loads(file.read_text(encoding="utf-8")))))
    elif weights[0].suffix == ".bin":
        weights[0].write_bytes(byte_level(rng, weights[0].read_bytes()))
    elif kind < 8:
        weights[0].write_bytes(header_level(rng, weights[0].read_bytes()))
    else:
        tensor_level(rng, weights[0])


class Worker:
    """Opens directories in another process, which is restarted when it dies or hangs."""

    def __init__(self):
        self.process = None

    def __call__(self, directory):
        """Return ("valid" | "refused" | "failed", message)."""
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.process.stdin.write(f"{directory}\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            # Twice: where both processes were stopped for a while, the first time is over when they go on.
            line = self.process.stdout.readline() if selector.select(SECONDS) or selector.select(SECONDS) else ""
        if not line:
            self.process.kill()
            code = self.process.wait()
            self.process = None
            return "failed", f"the process ended or hung ({code})"
        return tuple(json.loads(line))

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def bases(folder):
    """Directories below 100 kB: packed BLOOM, packed LLaMA in act-order and 3 bits, a LLaMA as a pickle."""
    from conftest import _save, packed_checkpoint
    from safetensors.torch import load_file
    from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    bloom = BloomConfig(vocab_size=384, hidden_size=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    llama = LlamaConfig(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
                        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    plain = [_save(BloomForCausalLM(bloom), folder / "bloom"), _save(LlamaForCausalLM(llama), folder / "llama")]
    found = [packed_checkpoint(plain[0], folder / "bloom-4bit"),
             packed_checkpoint(plain[1], folder / "llama-3bit", bits=3, sym=False, act_order=True)]
    pickled = shutil.copytree(plain[1], folder / "llama-bin")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for directory in (*found, pickled):
        assert sum(file.stat().st_size for file in directory.iterdir()) < 100_000
    return [*found, pickled]


def mutant(seed, base, folder):
    """A mutated copy of a base, determined by the seed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    mutate(random.Random(seed), folder)
    return folder


def open_directory(path):
    """Run `inspect` and `load`, and if both succeed, compute some logits."""
    import gptq_belle
    from gptq_belle.checkpoint.inspection import inspect
    from gptq_belle.errors import InputError, UsageError

    def load():
        model = gptq_belle.load(path)
        with contextlib.suppress(UsageError):  # a context shorter than these tokens
            model.logits(torch.tensor([[5, 7, 300]]))

    said = []
    for act in (lambda: inspect(path), load):
        try:
            act()
        except InputError as error:
            if not error.cause or not error.remedy:
                return "failed", f"no cause or no remedy: {error}"
            said.append(str(error))
        except Exception:
            return "failed", traceback.format_exc()
    return ("refused", said[0]) if said else ("valid", "")


def main():
    os.environ["HF_HUB_OFFLINE"] = "1"
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints
    if "LD_PRELOAD" not in os.environ:  # the sanitizers' shadow needs addresses
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    torch.set_num_threads(1)
    for line in sys.stdin:
        os.write(out, (json.dumps(open_directory(line.rstrip("\n"))) + "\n").encode())


if __name__ == "__main__":
    main()
