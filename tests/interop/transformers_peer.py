"""Plain transformers with optimum and gptqmodel installed, on the CPU."""

import os

os.cpu_count = lambda: max(4, len(os.sched_getaffinity(0)))  # gptqmodel refuses to start on fewer than four processors

import torch  # noqa: E402
from jobs import run  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig  # noqa: E402


def logits(path, ids):
    return AutoModelForCausalLM.from_pretrained(path, device_map="cpu")(input_ids=ids).logits


def quantize(job):
    rows = torch.tensor(job["rows"])[:, None]
    tokenizer = AutoTokenizer.from_pretrained(job["source"])
    config = GPTQConfig(**{name: job[name] for name in ("bits", "group_size", "sym", "desc_act")}, tokenizer=tokenizer,
                        dataset=[{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
    model = AutoModelForCausalLM.from_pretrained(job["source"], quantization_config=config, device_map="cpu",
                                                 dtype=torch.float32)
    model.config.quantization_config.dataset = None  # tensors, which JSON does not hold
    model.save_pretrained(job["path"])
    tokenizer.save_pretrained(job["path"])


run(["transformers", "optimum", "gptqmodel"], logits, quantize)
