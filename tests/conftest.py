"""Shared fixtures: random seeds, tolerances, tiny models of both architectures, and random packed checkpoints."""

import json
import re
import shutil
from pathlib import Path

import pytest

import gptq_belle  # noqa: F401 - before torch: sets how long threads spin

# isort: split
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gptq_belle.cli import app, console
from gptq_belle.formats.gptq_weight import QuantizedWeight, pack
from gptq_belle.formats.zero_points import V1, V2
from gptq_belle.models.discovery import architecture
from gptq_belle.quantization.config import QuantConfig

# (rtol, atol) of a result in the dtype of its activations against float64 arithmetic on the same weights.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-2, 2e-2),
    torch.bfloat16: (6e-2, 6e-2),
}

VOCABULARY = 384
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
SENTENCES = [
    "Human: 请介绍一下北京的历史。\n\nAssistant: 北京是中国的首都,有三千多年的历史。",
    "Human: 写一首关于春天的诗。\n\nAssistant: 春风吹绿江南岸,明月何时照我还。",
    "Human: What is the capital of France?\n\nAssistant: The capital of France is Paris.",
    "Human: 一加一等于几?\n\nAssistant: 一加一等于二。",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "人工智能正在改变我们的生活,语言模型可以回答问题、翻译文章、编写程序。",
]


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _start_alike():
    """Reset random seeds and threads before every test."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def belle(capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*args):
        with pytest.raises(SystemExit) as left:
            console.run(app.app, [str(arg) for arg in args])
        printed = capsys.readouterr()
        return left.value.code or 0, printed.out, printed.err

    return call


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most VOCABULARY tokens; every text can be decoded exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>", clean_up_tokenization_spaces=False)


def _save(model: torch.nn.Module, path: Path) -> Path:
    """Set biases and norms to random values, and write the model in float16."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.half().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory) -> Path:
    """A Hugging Face directory: BLOOM, hidden 128, 2 blocks, 4 heads, tied head, float16."""
    torch.manual_seed(1)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=128, n_layer=2, n_head=4, initializer_range=0.1,
                         seq_length=256, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    return _save(BloomForCausalLM(config), tmp_path_factory.mktemp("tiny") / "bloom")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A Hugging Face directory: LLaMA, hidden 128, 2 blocks, 4 heads on 2 of keys and values, untied, float16."""
    torch.manual_seed(2)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
                         max_position_embeddings=256, tie_word_embeddings=False,
                         bos_token_id=1, eos_token_id=2, pad_token_id=3)
    return _save(LlamaForCausalLM(config), tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(params=["bloom", "llama"])
def tiny_model(request) -> Path:
    """Each of the two tiny models. Shared by the session: copy it before changes."""
    return request.getfixturevalue(f"tiny_{request.param}")


def random_quantized(weight: Tensor, bits: int, group_size: int, *, sym: bool = True, act_order: bool = False,
                     lowest_zero: int = 0) -> QuantizedWeight:
    """Round a weight (N, K) to a grid with random groups' zero points: any valid checkpoint, not a good one.

    With `sym` every zero is 2**(bits - 1); else they are drawn from lowest_zero up to 2**bits - 1, and the scales of
    every third output are negative. With `act_order` the inputs are dealt to the groups at random.
    """
    n, k = weight.shape
    group = k if group_size == -1 else group_size
    g_idx = torch.arange(k) // group
    if act_order:
        g_idx = g_idx[torch.randperm(k)]
    groups, top = -(-k // group), 2**bits - 1
    owner = g_idx.expand(n, k)
    scales = torch.zeros(n, groups).scatter_reduce_(1, owner, weight.float().abs(), "amax") / 2 ** (bits - 1)
    zeros = torch.full((n, groups), 2 ** (bits - 1))
    if not sym:
        zeros = torch.randint(lowest_zero, top + 1, (n, groups))
        scales[::3] *= -1
    scales = scales.half().float()
    codes = (weight.float() / scales[:, g_idx] + zeros[:, g_idx]).round().clamp(0, top)
    return QuantizedWeight(codes.to(torch.uint8), scales, zeros.to(torch.int32), g_idx.to(torch.int32))


def packed_checkpoint(source: Path, out: Path, *, bits: int = 4, group_size: int = 32, sym: bool = True,
                      act_order: bool = False, checkpoint_format: str | None = None, with_g_idx: bool = True) -> Path:
    """Write a standard GPTQ directory of a tiny model, its linears rounded to random grids (see random_quantized).

    Args:
        source: tiny_bloom or tiny_llama.
        checkpoint_format: "gptq" or "gptq_v2"; left out, what QuantConfig chooses for `sym`.
        with_g_idx: leave the tensor out where false, as old files do.
    """
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    names = architecture(config).linears
    settings = QuantConfig(bits=bits, group_size=group_size, sym=sym, act_order=act_order).to_dict()
    settings["format"] = settings["checkpoint_format"] = checkpoint_format or (V1 if sym else V2)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith(names) or name == module:
            tensors[name] = tensor
            continue
        weight = random_quantized(tensor, bits, group_size, sym=sym, act_order=act_order,
                                  lowest_zero=1 if settings["format"] == V1 else 0)
        packed = pack(weight, bits, settings["format"])._asdict()
        if not with_g_idx:
            del packed["g_idx"]
        tensors |= {f"{module}.{kind}": value.contiguous() for kind, value in packed.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = settings
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (out / "quantize_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return out


MEASURED = ("seconds", "phases", "peak_memory", "resumed")  # of a report: no two runs agree on them


def job_output(directory: Path) -> tuple[dict[str, bytes], dict]:
    """All files of a quantized directory, without the varying parts of the report."""
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    report = json.loads(files.pop("quantization_report.json"))
    linears = [{key: value for key, value in row.items() if key != "seconds"} for row in report["linears"]]
    return files, {key: value for key, value in report.items() if key not in MEASURED} | {"linears": linears}


def naming(*objects: object) -> str:
    """A pattern for `match=` that holds for a message that names all of these, in any order and any wording.

    Names are files, tensors, layers, options, values or figures; each must occur as a whole word.
    """
    return "(?s)^" + "".join(rf"(?=.*(?<!\w){re.escape(str(one))}(?!\w))" for one in objects)


def cut_short(path: Path) -> None:
    """Truncate a file to its first half, like an interrupted download."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
