"""Demo models for gptq_belle: a generator of Chinese instructions, its tokenizer, two small models, their training."""
