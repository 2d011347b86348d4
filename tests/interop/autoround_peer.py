"""auto-round's quantizer and its exports, loaded by transformers with auto-round, on the CPU."""

from pathlib import Path

import torch
from auto_round import AutoRound
from jobs import run
from transformers import AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer


def logits(path, ids):
    # Of its own accord it chooses a backend for asymmetric weights on a CPU that fails.
    model = AutoModelForCausalLM.from_pretrained(path, device_map="cpu", dtype=torch.float32,
                                                 quantization_config=AutoRoundConfig(backend="auto_round:torch"))
    return model(input_ids=ids).logits


def quantize(job):
    tokenizer = AutoTokenizer.from_pretrained(job["source"])
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.float32)
    rows = torch.utils.data.DataLoader([{"input_ids": torch.tensor(row), "attention_mask": torch.ones(len(row)).long()}
                                        for row in job["rows"]])
    rounds = AutoRound(model, tokenizer, bits=job["bits"], group_size=job["group_size"], sym=job["sym"], iters=0,
                       device_map="cpu", dataset=rows, seqlen=len(job["rows"][0]), nsamples=len(job["rows"]),
                       **({"layer_config": job["layers"]} if "layers" in job else {}))
    rounds.quantize_and_save(job["path"], format=job["format"])
    inner = next(Path(job["path"]).rglob("config.json")).parent  # a folder named after the source and the scheme
    for file in inner.iterdir():
        file.rename(Path(job["path"]) / file.name)


run(["auto-round", "transformers"], logits, quantize)
