"""llm-compressor's GPTQ, exported as compressed-tensors and loaded by transformers with that package, on the CPU."""

import torch
from datasets import Dataset
from jobs import run
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def logits(path, ids):
    model = AutoModelForCausalLM.from_pretrained(path, device_map="cpu", dtype=torch.float32)
    return model(input_ids=ids).logits


def quantize(job):
    tokenizer = AutoTokenizer.from_pretrained(job["source"])
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.float32)
    rows = Dataset.from_dict({"input_ids": job["rows"], "attention_mask": [[1] * len(row) for row in job["rows"]]})
    group = job["group_size"]
    weights = {"num_bits": job["bits"], "type": "int", "symmetric": job["sym"],
               **({"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}),
               **({"actorder": "group"} if job["desc_act"] else {"actorder": None})}
    recipe = GPTQModifier(ignore=["lm_head"],
                          config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})
    oneshot(model=model, dataset=rows, recipe=recipe, max_seq_length=128, num_calibration_samples=len(job["rows"]))
    model.save_pretrained(job["path"], save_compressed=True)
    tokenizer.save_pretrained(job["path"])


run(["llmcompressor", "compressed-tensors", "transformers"], logits, quantize)
