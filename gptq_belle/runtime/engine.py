"""A loaded model: logits, generation and streaming, one sequence at a time, with transformers' key-value cache."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from gptq_belle.checkpoint.directory import load_tokenizer
from gptq_belle.errors import UsageError
from gptq_belle.runtime.chat import TextStream, Turn, detect_style, render, style_named
from gptq_belle.runtime.loader import hf_model
from gptq_belle.runtime.sampling import Sampler, SamplingParams

MOST_NEW_TOKENS = 512  # where the caller sets no limit
CONTEXT_KEYS = ("max_position_embeddings", "seq_length", "n_positions")  # LLaMA's name, then BLOOM's


def load(path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None,
         precision: str | None = None) -> "Model":
    """Load a model directory, quantized or not.

    Args:
        path: a Hugging Face directory; without a tokenizer, everything that takes token ids still works.
        device: "auto", "cpu" or "cuda:0".
        dtype, precision: as `runtime.loader.hf_model`.
    Raises:
        InputError, UsageError, HardwareError: as `runtime.loader.hf_model`.
    """
    return Model(hf_model(path, device=device, dtype=dtype, precision=precision), Path(path))


class Model:
    """A model that answers.

    Attributes:
        hf: the transformers model with packed linears inside.
        path: the directory it came from.
        config: its transformers configuration.
        device: where it lives.
        dtype: of its activations.
        context: the most tokens that prompt and answer may have together; None where the configuration does not say.
    """

    def __init__(self, hf: PreTrainedModel, path: Path) -> None:
        self.hf, self.path, self.config = hf, path, hf.config
        self.device, self.dtype = hf.device, hf.dtype
        limits = (getattr(hf.config, key, None) for key in CONTEXT_KEYS)
        self.context: int | None = next((limit for limit in limits if limit), None)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The directory's tokenizer.

        Raises:
            InputError: it has none.
        """
        return load_tokenizer(self.path)

    @cached_property
    def prompt_style(self) -> str:
        """The wording of prompts that suits the model: a key of `runtime.chat.STYLES`."""
        return detect_style(self.config.to_dict(), getattr(self.tokenizer, "chat_template", None))

    @torch.inference_mode()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) float32 of token ids (B, T) int64, all rows full.

        Raises:
            UsageError: not a matrix, empty, or longer than the context.
        """
        self._check_ids(input_ids)
        logits: Tensor = self.hf(input_ids=input_ids.to(self.device), use_cache=False).logits
        return logits.float()

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, DynamicCache]:
        """Read a prompt.

        Args:
            input_ids: (B, T) int64.
        Returns:
            logits (B, V) float32 behind the last token, and the cache that `decode` continues.
        Raises:
            UsageError: as `logits`.
        """
        self._check_ids(input_ids)
        cache = DynamicCache(config=self.config)
        return self._step(input_ids, cache), cache

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: DynamicCache) -> Tensor:
        """Logits (B, V) float32 behind one more token a row, tokens (B,) int64; the cache grows by one."""
        return self._step(tokens.view(-1, 1), cache)

    def generate(self, prompt: str | Sequence[int] | Tensor, *, prompt_style: str | None = None,
                 **sampling: Any) -> str:
        """The answer to a prompt, or its continuation; see `stream`."""
        return "".join(self.stream(prompt, prompt_style=prompt_style, **sampling))

    def stream(self, prompt: str | Sequence[int] | Tensor, *, prompt_style: str | None = None,
               **sampling: Any) -> Iterator[str]:
        """The same in pieces, each as soon as it is certain.

        Args:
            prompt: text, or token ids that are taken as they are.
            prompt_style: None continues the text; "auto" or a key of `runtime.chat.STYLES` takes it as a question,
                wraps it, and ends the answer where the model runs on into the next question.
            sampling: fields of `runtime.sampling.SamplingParams`.
        Raises:
            UsageError: before the first piece: a wrong option, an empty prompt, one that the context cannot hold.
            InputError: text is needed and the directory has no tokenizer.
        """
        params = SamplingParams(**sampling)
        ids, stops = self._encode(prompt, prompt_style)
        room = self._room(len(ids), params.max_new_tokens)
        return self._text(self.tokens(ids, room, params), (*params.stop, *stops))

    def tokens(self, ids: Sequence[int], count: int, params: SamplingParams) -> Iterator[int]:
        """Draw up to `count` tokens behind `ids`; ends in front of eos unless `params.ignore_eos`."""
        sampler = Sampler(params, ids, self.device)
        logits, cache = self.prefill(torch.tensor([list(ids)]))
        for drawn in range(1, count + 1):
            token = sampler(logits[0])
            if token in self.eos_ids and not params.ignore_eos:
                return
            yield token
            if drawn < count:
                logits = self.decode(torch.tensor([token]), cache)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        generation = getattr(self.hf, "generation_config", None)
        found = getattr(generation, "eos_token_id", None), self.config.eos_token_id
        return frozenset(i for ids in found for i in (ids if isinstance(ids, list) else [ids]) if i is not None)

    def _step(self, input_ids: Tensor, cache: DynamicCache) -> Tensor:
        output = self.hf(input_ids=input_ids.to(self.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits.float()

    def _text(self, tokens: Iterator[int], stops: Sequence[str]) -> Iterator[str]:
        tokenizer = self.tokenizer
        text = TextStream(lambda ids: str(tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)), stops)
        for token in tokens:
            if piece := text.feed([token]):
                yield piece
            if text.stopped:
                return
        if piece := text.finish():
            yield piece

    def _encode(self, prompt: str | Sequence[int] | Tensor,
                prompt_style: str | None) -> tuple[list[int], Sequence[str]]:
        """Token ids of a prompt, and the stop strings that its style brings."""
        if not isinstance(prompt, str):
            ids = prompt.flatten().tolist() if isinstance(prompt, Tensor) else list(prompt)
            return ids, ()
        if prompt_style is None:
            return self.tokenizer(prompt)["input_ids"], ()
        name = self.prompt_style if prompt_style == "auto" else prompt_style
        style = style_named(name)
        text = render([Turn(prompt)], name, self.tokenizer.eos_token)
        return self.tokenizer(text, add_special_tokens=style.special_tokens)["input_ids"], style.stops

    def _room(self, length: int, asked: int | None) -> int:
        """How many tokens to generate behind a prompt of `length`."""
        room = MOST_NEW_TOKENS if self.context is None else self.context - length
        if room < max(1, asked or 1) and self.context is not None:
            wanted = f" and {asked} new ones" if asked else " and an answer"
            raise UsageError(f"a prompt of {length} tokens{wanted} do not fit into this model's {self.context}",
                             "Shorten the prompt, or ask for fewer new tokens.")
        return asked or min(room, MOST_NEW_TOKENS)

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise UsageError(f"token ids of shape {tuple(input_ids.shape)} cannot be run", "Give (rows, tokens).")
        if self.context is not None and input_ids.shape[1] > self.context:
            raise UsageError(f"{input_ids.shape[1]} tokens are more than this model's context of {self.context}",
                             "Give fewer tokens.")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise UsageError(f"token ids {low}..{high} are not all in the vocabulary of {self.config.vocab_size}",
                             "The tokenizer belongs to another model.")
