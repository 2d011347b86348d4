"""Token ids in, logits out: whole sequences, and prompts and steps on a cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.engine.attention import Decode, NativeDecode, Prefill, Whole
from gptq_belle.engine.bloom import Bloom
from gptq_belle.engine.kv_cache import Cache
from gptq_belle.engine.llama import Llama
from gptq_belle.engine.step_graph import MOST_ROWS, Recorded
from gptq_belle.engine.weights import Weights
from gptq_belle.errors import UsageError
from gptq_belle.models.decoder_config import Settings

MOST_NEW_TOKENS = 512  # where the caller sets no limit
CHUNK = 192  # tokens of a prompt that are read at a time: 256 take 38 MB more of BELLE-7B, and as long


class Session:
    """Rows of equal length that were read together, with their keys and values."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.length = 0


class Tokens:
    """A model that takes token ids and gives logits.

    Attributes:
        decoder: of `gptq_belle.models`.
        settings: what config.json says about it.
        path: the directory it came from.
        config: config.json as a dictionary.
        device: where it lives.
        dtype: of its activations.
        context: the most tokens that prompt and answer may have together; None where the configuration does not say.
        eos_ids: tokens that end an answer.
        quantization: of its packed weights; None where it has none.
        weight_bytes: of all weights as they lie in memory.
        step_bytes: of those that a step of decoding reads whole: all but an embedding that is not also the head.
        replays: whether steps through the blocks are recorded and made again in one call; false where a linear is not
            native. It can be switched off.
    """

    def __init__(self, decoder: Bloom | Llama, settings: Settings, reader: CheckpointReader, weights: Weights,
                 cache: str, eos: frozenset[int]) -> None:
        self.decoder, self.settings, self.path, self.config = decoder, settings, reader.path, reader.config
        self.device, self.dtype, self.cache_kind, self.eos_ids = weights.device, weights.dtype, cache, eos
        self.context = settings.context
        self.quantization = weights.quantization
        self.weight_bytes = weights.nbytes
        self.replays = weights.native
        self.step_bytes = weights.nbytes - decoder.embedding.extra_bytes

    @torch.inference_mode()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) float32 of token ids (B, T) int64. Rows that are shorter may be padded behind their end
        with any token: what stands there changes nothing in front of it.

        Raises:
            UsageError: not a matrix, empty, or longer than the context.
        """
        self.check_ids(input_ids)
        rows, length = input_ids.shape
        attend = Whole(self.decoder.heads, rows, length, self.device, self.dtype)
        hidden = self.decoder.through(self.decoder.embed(input_ids.to(self.device).flatten()), attend)
        return self.decoder.logits(hidden).float().view(rows, length, -1)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, room: int = MOST_NEW_TOKENS) -> tuple[Tensor, Session]:
        """Read prompts of equal length.

        Args:
            input_ids: (B, T) int64.
            room: for how many tokens behind them; the context may leave less.
        Returns:
            logits (B, V) float32 behind the last token, and what `decode` continues.
        Raises:
            UsageError: as `logits`.
            HardwareError: no memory for the cache.
        """
        self.check_ids(input_ids)
        rows, length = input_ids.shape
        capacity = length + room if self.context is None else min(length + room, self.context)
        session = Session(self.new_cache(rows, capacity))
        session.length = length
        ids = input_ids.to(self.device)
        return torch.cat([self.read(ids[row], session.cache, row) for row in range(rows)]), session

    @torch.inference_mode()
    def decode(self, tokens: Tensor, session: Session) -> Tensor:
        """Logits (B, V) float32 behind one more token a row, tokens (B,) int64.

        Raises:
            UsageError: there is no room for it.
        """
        if session.length >= session.cache.capacity:
            raise UsageError(f"{session.length + 1} tokens do not fit into a cache of {session.cache.capacity}",
                             "Ask for fewer new tokens.")
        slots = list(range(len(tokens)))
        logits = self.step(tokens.to(self.device), session.cache, slots, [session.length] * len(slots))
        session.length += 1
        return logits

    def new_cache(self, slots: int, capacity: int) -> Cache:
        """An empty cache for so many sequences of at most `capacity` tokens; raises HardwareError without memory."""
        sizes = self.settings.sizes
        return Cache(sizes.blocks, slots, sizes.kv_heads, capacity, sizes.head_dim, self.cache_kind, self.device)

    @torch.inference_mode()
    def read(self, ids: Tensor, cache: Cache, slot: int, start: int = 0) -> Tensor:
        """Read ids (T,) behind the first `start` tokens of a slot, CHUNK at a time: logits (1, V) float32."""
        for at in range(0, len(ids), CHUNK):
            chunk = ids[at : at + CHUNK]
            attend = Prefill(self.decoder.heads, cache, slot, start + at, len(chunk), self.dtype)
            hidden = self.decoder.through(self.decoder.embed(chunk), attend)
        return self.decoder.logits(hidden[-1:]).float()

    @torch.inference_mode()
    def step(self, tokens: Tensor, cache: Cache, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Logits (n, V) float32 behind one more token (n,) in each of some slots that hold `lengths` tokens so far."""
        x = self.decoder.embed(tokens)
        return self.decoder.logits(self._through(x, cache, slots, lengths)).float()

    def _through(self, x: Tensor, cache: Cache, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        heads, rows = self.decoder.heads, len(slots)
        if cache.tables is None:
            return self.decoder.through(x, Decode(heads, cache, slots, lengths, self.dtype))
        if self.replays and rows in cache.recorded:
            return cache.recorded[rows].again(x, slots, lengths)
        attend = NativeDecode(heads, cache.tables, slots, lengths)
        if not self.replays or rows > MOST_ROWS:
            return self.decoder.through(x, attend)
        cache.recorded[rows] = Recorded(self.decoder, x, attend)
        return cache.recorded[rows].hidden

    def check_ids(self, input_ids: Tensor) -> None:
        """Raises UsageError where token ids (B, T) are no filled matrix, too many for the context, or unknown."""
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise UsageError(f"token ids of shape {tuple(input_ids.shape)} cannot be run", "Give (rows, tokens).")
        if self.context is not None and input_ids.shape[1] > self.context:
            raise UsageError(f"{input_ids.shape[1]} tokens are more than this model's context of {self.context}",
                             "Give fewer tokens.")
        low, high, vocabulary = int(input_ids.min()), int(input_ids.max()), self.settings.sizes.vocabulary
        if low < 0 or high >= vocabulary:
            raise UsageError(f"token ids {low}..{high} are not all in the vocabulary of {vocabulary}",
                             "The tokenizer belongs to another model.")
