"""The model class `gptq_belle` of lm-evaluation-harness, so that its tasks run without a server.

    pip install 'gptq-belle[lm-eval]'
    lm-eval run --model gptq_belle --model_args path=belle-7b-4bit --tasks ceval-valid

The entry point ``lm_eval.models`` in pyproject.toml names it; versions of lm-eval without plugins take an instance:
``lm_eval.simple_evaluate(model=BelleLM("belle-7b-4bit"), tasks=[...])``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM

from gptq_belle.engine.model import load

DEFAULT_NEW_TOKENS = 256


class BelleLM(TemplateLM):
    """A model directory behind the interface of `lm_eval.api.model.LM`.

    Args:
        path: a model directory, quantized or not.
        device, precision, cache: as in `gptq_belle.load`.
        max_gen_toks: most tokens of an answer, where the task does not say.
        batch_size, max_batch_size: accepted because the harness passes them; each request runs alone.
    """

    def __init__(self, path: str | Path, device: str | None = None, precision: str | None = None,
                 cache: str = "float16", max_gen_toks: int = DEFAULT_NEW_TOKENS, batch_size: Any = 1,
                 max_batch_size: Any = None) -> None:
        super().__init__()
        self.model = load(path, device=device or "auto", precision=precision, cache=cache)
        self.max_gen_toks = int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        """The token before the first one of a text without context: the eos token."""
        return int(self.model.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's cache of requests."""
        return str(self.model.path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; with special tokens unless `add_special_tokens` is False."""
        added = True if add_special_tokens is None else add_special_tokens
        return list(self.model.tokenizer(string, add_special_tokens=added)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation by the chat template of the directory."""
        return str(self.model.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt))

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]],
                              disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): log probability of the continuation, and whether it is greedy."""
        return [self._score(context, continuation) for _, context, continuation in requests]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids = (context or [self.eot_token_id]) + continuation
        if self.model.context is not None:
            ids = ids[-self.model.context :]
        scored = self.model.token_logprobs(ids, 1)[-len(continuation) :]
        tokens = ids[-len(scored) :]
        return (sum(own for own, _ in scored),
                all(best[0][0] == token for token, (_, best) in zip(tokens, scored, strict=True)))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts; one that exceeds the context is cut into pieces of at most its length."""
        found = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            size = (self.model.context or len(ids) + 1) - 1
            pieces = [ids[at : at + size] for at in range(0, len(ids), size)]
            found.append(sum(self._score([self.eot_token_id], piece)[0] for piece in pieces))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each text until one of the strings of its task."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, text: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        count = int(options.get("max_gen_toks", self.max_gen_toks))
        ids = self.tok_encode(text)
        if self.model.context is not None:
            ids = ids[-max(1, self.model.context - count) :]
        sampled = bool(options.get("do_sample")) and float(options.get("temperature", 1.0)) > 0
        return self.model.generate(ids, max_new_tokens=count, stop=tuple(stop for stop in stops if stop),
                                   temperature=float(options.get("temperature", 1.0)) if sampled else 0.0)
