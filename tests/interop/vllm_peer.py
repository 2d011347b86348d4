"""vLLM on the CPU: logits of every position, greedy tokens, with one or several tensor-parallel ranks.

A job may say {"do": "generate", "path": DIR, "ids": [[...]], "tokens": N, "ranks": N}. One model is loaded at a time.
"""

import gc
import os

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}

import torch  # noqa: E402
from jobs import run  # noqa: E402
from vllm import LLM, SamplingParams, TokensPrompt  # noqa: E402


def model(path, ranks=1):
    return LLM(model=path, dtype="float16", enforce_eager=True, max_model_len=256, max_num_seqs=2, max_logprobs=-1,
               logprobs_mode="raw_logits", tensor_parallel_size=ranks, skip_tokenizer_init=True,
               enable_prefix_caching=False)


def logits(path, ids, ranks=1):
    """Logits (B, T, V); those of the last position are of a decode step's first token."""
    made = model(path, ranks)
    try:
        settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, logprobs=-1, detokenize=False)
        found = made.generate([TokensPrompt(prompt_token_ids=row) for row in ids.tolist()], settings, use_tqdm=False)
        return torch.stack([torch.stack([_row(each) for each in (*answer.prompt_logprobs[1:],
                                                                 answer.outputs[0].logprobs[0])]) for answer in found])
    finally:
        del made
        gc.collect()


def _row(entries):
    row = torch.empty(len(entries))
    row[list(entries)] = torch.tensor([entry.logprob for entry in entries.values()])
    return row


def generate(job):
    made = model(job["path"], job.get("ranks", 1))
    try:
        settings = SamplingParams(max_tokens=job["tokens"], temperature=0, ignore_eos=True, detokenize=False)
        found = made.generate([TokensPrompt(prompt_token_ids=row) for row in job["ids"]], settings, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in found]
    finally:
        del made
        gc.collect()


if __name__ == "__main__":
    run(["vllm-cpu", "transformers"], logits, generate=generate)
