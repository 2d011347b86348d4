"""A typical notebook for AutoGPTQ 0.7: quantize, save twice, load, and generate in two ways.

test_auto_gptq.py changes its import and runs it. Arguments: the model, the directory to write, the device.
"""

import logging
import os
import sys

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from transformers import AutoTokenizer, TextGenerationPipeline

pretrained_model_dir, quantized_model_dir, device = sys.argv[1:]
logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)

tokenizer = AutoTokenizer.from_pretrained(pretrained_model_dir, use_fast=True)
texts = ["Human: 请介绍一下北京。\n\nAssistant: 北京是中国的首都。", "Human: 一加一等于几?\n\nAssistant: 二。"] * 8
examples = [tokenizer(text, return_tensors="pt") for text in texts]

quantize_config = BaseQuantizeConfig(bits=4, group_size=128, desc_act=False, damp_percent=0.1)
model = AutoGPTQForCausalLM.from_pretrained(pretrained_model_dir, quantize_config)
model.quantize(examples, batch_size=1, use_triton=False)

os.makedirs(quantized_model_dir, exist_ok=True)
tokenizer.save_pretrained(quantized_model_dir)
model.save_quantized(quantized_model_dir)
model.save_quantized(quantized_model_dir, use_safetensors=True)

model = AutoGPTQForCausalLM.from_quantized(quantized_model_dir, device=device, use_triton=False, use_safetensors=True,
                                           model_basename="gptq_model-4bit-128g", inject_fused_attention=False,
                                           trust_remote_code=False, disable_exllama=True)
model.eval()
prompt = "Human: 一加一等于几?\n\nAssistant:"
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
print("generate:", tokenizer.decode(model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]))

pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer, device=device)
print("pipeline:", pipeline(prompt, max_new_tokens=16, do_sample=False)[0]["generated_text"])
