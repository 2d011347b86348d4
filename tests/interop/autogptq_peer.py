"""AutoGPTQ 0.7.1 with the transformers of its time, on the CPU.

Its quantizer insists on CUDA without needing it: a substitute reports one, whose name is "cpu".
"""

import os

import torch
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.modeling import _base
from jobs import run

CPU = torch.device("cpu")


def logits(path, ids):
    names = [name.removesuffix(".safetensors") for name in os.listdir(path) if name.endswith(".safetensors")]
    model = AutoGPTQForCausalLM.from_quantized(path, model_basename=names[0], device="cpu", use_safetensors=True,
                                               disable_exllama=True, disable_exllamav2=True)
    return model.model(input_ids=ids).logits


def quantize(job):
    config = BaseQuantizeConfig(**{name: job[name] for name in ("bits", "group_size", "sym", "desc_act")})
    available, synchronize, device = torch.cuda.is_available, torch.cuda.synchronize, _base.CUDA_0
    torch.cuda.is_available, torch.cuda.synchronize, _base.CUDA_0 = (lambda: True), (lambda *_: None), CPU
    try:
        model = AutoGPTQForCausalLM.from_pretrained(job["source"], config, torch_dtype=torch.float32)
        torch.cuda.is_available = available
        model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["rows"]],
                       cache_examples_on_gpu=False)
    finally:
        torch.cuda.is_available, torch.cuda.synchronize, _base.CUDA_0 = available, synchronize, device
    model.save_quantized(job["path"])


run(["auto_gptq", "transformers"], logits, quantize)
