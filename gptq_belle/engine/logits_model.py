"""Token ids in, logits out: whole sequences without a cache, prefill and decode steps with one."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.engine.attention import NativeDecodeAttention
from gptq_belle.engine.bloom import Bloom
from gptq_belle.engine.finite_check import explain_nonfinite, nonfinite_rows
from gptq_belle.engine.fused_decoder import FusedDecoder, fuse, fusion_obstacle
from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.engine.linear import packed_linears
from gptq_belle.engine.llama import Llama
from gptq_belle.engine.prefix_cache import PrefixCache
from gptq_belle.engine.prompt_arguments import is_integer_dtype
from gptq_belle.engine.sampling_params import DEFAULT_MAX_NEW_TOKENS
from gptq_belle.engine.step_graph import MAX_GRAPH_ROWS, StepGraph
from gptq_belle.engine.transformers_decoder import TransformersDecoder
from gptq_belle.engine.weight_loader import WeightLoader
from gptq_belle.errors import UsageError
from gptq_belle.kernels import dispatch
from gptq_belle.kernels.triton_config import MAX_SKINNY_ROWS
from gptq_belle.kernels.triton_launch import Launch
from gptq_belle.models.decoder_config import DecoderConfig
from gptq_belle.models.sizes import PREFILL_CHUNK

if TYPE_CHECKING:
    from gptq_belle.engine.fused_decoding import FusedDecoding

Decoder = Bloom | Llama | TransformersDecoder
ScoredPosition = tuple[float, list[tuple[int, float]]]  # log probability of a token, and the most likely tokens
LOGITS_BYTES = 1 << 26  # bytes of logits at a time in `logprob_chunks`: 67 rows of BLOOM's vocabulary


class PrefilledBatch:
    """Prompts of equal length that were prefilled together, and their KV cache."""

    def __init__(self, cache: KVCache, length: int) -> None:
        self.cache, self.length = cache, length


class LogitsModel:
    """A model that takes token ids and returns logits.

    Attributes:
        decoder: embedding, blocks and lm_head.
        decoder_config: sizes and constants from config.json.
        path: the directory it was loaded from.
        config: config.json as a dictionary.
        device: device of weights and cache.
        dtype: dtype of activations.
        context: limit of prompt and answer tokens together; None if the configuration does not state one.
        eos_ids: tokens that end an answer.
        quantization: settings of the packed weights; None for a full-precision model.
        weight_bytes: memory of all weights in bytes.
        step_bytes: bytes of weights that a decode step reads: all except an untied embedding.
        prefix_cache: prompts of earlier requests in host memory; None if there is none.
        use_step_graphs: whether decode steps are recorded and replayed: on a CPU in one native call, on a GPU as fused
            launches in a CUDA graph (`unfused_reason`). False if the kernels do not support a part of the model. Can be
            set to False.
    """

    def __init__(self, decoder: Decoder, decoder_config: DecoderConfig, reader: CheckpointReader,
                 weights: WeightLoader, cache: str, eos: frozenset[int]) -> None:
        self.decoder, self.decoder_config, self.path, self.config = decoder, decoder_config, reader.path, reader.config
        self.device, self.dtype, self.cache_kind, self.eos_ids = weights.device, weights.dtype, cache, eos
        self.context = decoder_config.context
        self.quantization = weights.quantization
        self.weight_bytes = weights.nbytes
        self.prefix_cache: PrefixCache | None = None
        self.use_step_graphs = weights.native or fusion_obstacle(decoder) is None
        self.step_bytes = weights.nbytes - decoder.embedding.extra_bytes

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        return self.decoder_config.dimensions.vocab_size

    @property
    def prefill_chunk(self) -> int:
        """Prompt tokens per forward pass on the model's device."""
        return PREFILL_CHUNK["cpu" if self.device.type == "cpu" else "cuda"]

    def warm_up(self, slots: int, capacity: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile the GPU kernels of prefill and decode, several at a time; on a CPU, nothing is compiled.

        Args:
            slots: most sequences of a decode step.
            capacity: most tokens of a prompt.
            progress: called with the numbers of finished kernels and of all.
        """
        if self.device.type == "cpu":
            return
        rows = max(slots, min(self.prefill_chunk, capacity))
        fused = self._fused_launches(slots, capacity)
        operators = [*((linear, rows) for block in self.decoder.blocks for linear in block.linears),
                     (self.decoder.head, 1 if fused and slots <= MAX_SKINNY_ROWS else slots)]  # 1 for prefill
        products = ((part.weight, part.bias, most) for operator, most in operators for part in packed_linears(operator))
        dispatch.warm_up(products, self.dtype, progress, fused)

    def _fused_launches(self, slots: int, capacity: int) -> list[Launch]:
        """The launches of fused decode steps; kernels are compiled for a capacity that 16 divides, or for others."""
        if not self.use_step_graphs or self.unfused_reason(1) is not None:
            return []
        assert self._fused is not None
        from gptq_belle.engine.fused_decoding import decoding_launches  # imports Triton

        return decoding_launches(self._fused, self.new_cache(1, 16 + capacity % 16), slots)

    @torch.inference_mode()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) float32 of token ids (B, T) int64, without a cache. Shorter rows may be padded at the end
        with any token: attention is causal, so padding does not change the positions before it.

        Raises:
            UsageError: not a matrix, empty, or longer than the context.
            InputError: logits that contain NaN or infinity; the first layer that does is named.
        """
        self.check_ids(input_ids)
        rows, length = input_ids.shape
        logits = self.decoder.logits(self._hidden(input_ids.to(self.device))).float()
        if failed := nonfinite_rows(logits):
            raise explain_nonfinite(self, input_ids.flatten()[: failed[0] + 1][failed[0] // length * length :].tolist())
        return logits.view(rows, length, -1)

    def _hidden(self, input_ids: Tensor) -> Tensor:
        """Outputs of the last block (B * T, width) for token ids (B, T)."""
        rows, length = input_ids.shape
        attention = self.decoder.uncached(self.decoder.attention_config, rows, length, self.device, self.dtype)
        return self.decoder.run_blocks(self.decoder.embed(input_ids.flatten()), attention)

    def token_logprobs(self, ids: Sequence[int], top: int) -> list[ScoredPosition]:
        """Natural logarithms of the probability of every token except the first, given the tokens before it; see
        `logprob_chunks`."""
        return [position for chunk in self.logprob_chunks(ids, top) for position in chunk]

    @torch.inference_mode()
    def logprob_chunks(self, ids: Sequence[int], top: int) -> Iterator[list[ScoredPosition]]:
        """The same chunk by chunk, so that other work can be done between two chunks of a long prompt.

        Logits are computed for some positions at a time: all of them at once are 2 GB for BLOOM and 2,000 tokens.

        Args:
            ids: token ids that fit into the context.
            top: number of most likely tokens to return per position.
        Yields:
            (logprob, [(token, logprob), ...]) of the next tokens.
        Raises:
            InputError: logits that contain NaN or infinity; the first layer that does is named.
            HardwareError: not enough memory for the keys and values of the prompt.
        """
        row = torch.tensor(list(ids), device=self.device)
        cache = self.new_cache(1, len(ids), str(self.dtype).removeprefix("torch."))
        rows = max(1, LOGITS_BYTES // (4 * self.vocabulary_size))
        for at in range(0, len(row) - 1, self.prefill_chunk):
            chunk = row[:-1][at : at + self.prefill_chunk]
            attention = self.decoder.prefill(self.decoder.attention_config, cache, 0, at, len(chunk), self.dtype)
            hidden = self.decoder.run_blocks(self.decoder.embed(chunk), attention)
            following = row[at + 1 : at + 1 + len(chunk)]
            found: list[ScoredPosition] = []
            for states, targets in zip(hidden.split(rows), following.split(rows), strict=True):
                logits = self.decoder.logits(states).float()
                if nonfinite_rows(logits):
                    raise explain_nonfinite(self, ids)
                logprobs = logits.log_softmax(-1)
                own = logprobs.gather(1, targets[:, None])[:, 0].tolist()
                values, indices = logprobs.topk(top)
                found += [(one, list(zip(tokens, likely, strict=True)))
                          for one, tokens, likely in zip(own, indices.tolist(), values.tolist(), strict=True)]
            yield found

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, room: int = DEFAULT_MAX_NEW_TOKENS) -> tuple[Tensor, PrefilledBatch]:
        """Prefill prompts of equal length.

        Args:
            input_ids: (B, T) int64.
            room: number of tokens that the cache has room for after them; the context may limit it further.
        Returns:
            logits (B, V) float32 after the last token, and the state that `decode` continues.
        Raises:
            UsageError: as `logits`.
            HardwareError: not enough memory for the cache.
        """
        self.check_ids(input_ids)
        rows, length = input_ids.shape
        capacity = length + room if self.context is None else min(length + room, self.context)
        batch = PrefilledBatch(self.new_cache(rows, capacity), length)
        ids = input_ids.to(self.device)
        return torch.cat([self.prefill_slot(ids[row], batch.cache, row) for row in range(rows)]), batch

    @torch.inference_mode()
    def decode(self, tokens: Tensor, batch: PrefilledBatch) -> Tensor:
        """Logits (B, V) float32 after one decode step with tokens (B,) int64.

        Raises:
            UsageError: the cache is full.
        """
        if batch.length >= batch.cache.capacity:
            raise UsageError(f"{batch.length + 1} tokens do not fit into a cache of {batch.cache.capacity}",
                             "Ask for fewer new tokens.")
        slots = list(range(len(tokens)))
        logits = self.decode_slots(tokens.to(self.device), batch.cache, slots, [batch.length] * len(slots))
        batch.length += 1
        return logits

    def new_cache(self, slots: int, capacity: int, kind: str | None = None) -> KVCache:
        """An empty cache for `slots` sequences of at most `capacity` tokens; HardwareError without enough memory."""
        d = self.decoder_config.dimensions
        return KVCache(d.num_layers, slots, d.num_kv_heads, capacity, d.head_dim, kind or self.cache_kind, self.device)

    @torch.inference_mode()
    def prefill_slot(self, ids: Tensor, cache: KVCache, slot: int, start: int = 0) -> Tensor:
        """Logits (1, V) float32 after prefilling ids (T,) of a slot with `start` cached tokens, chunk by chunk."""
        for at in range(0, len(ids), self.prefill_chunk):
            chunk = ids[at : at + self.prefill_chunk]
            attention = self.decoder.prefill(self.decoder.attention_config, cache, slot, start + at, len(chunk),
                                             self.dtype)
            hidden = self.decoder.run_blocks(self.decoder.embed(chunk), attention)
        return self.decoder.logits(hidden[-1:]).float()

    @torch.inference_mode()
    def decode_slots(self, tokens: Tensor, cache: KVCache, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Logits (n, V) float32 after one decode step with tokens (n,) in slots with `lengths` cached tokens each."""
        if (fused := self.fused_decoding(cache, len(slots))) is not None:
            return fused.logits(tokens, slots, lengths).clone()
        x = self.decoder.embed(tokens)
        return self.decoder.logits(self._decode_blocks(x, cache, slots, lengths)).float()

    def fused_decoding(self, cache: KVCache, rows: int) -> "FusedDecoding | None":
        """Fused decode steps of `rows` rows on a cache; None on a CPU, and where the fused kernels do not serve."""
        if not self.use_step_graphs or self.unfused_reason(rows, cache.kind) is not None:
            return None
        if cache.fused is None:
            assert self._fused is not None
            from gptq_belle.engine.fused_decoding import FusedDecoding  # imports Triton

            with torch.inference_mode(), torch.cuda.device_of(cache.keys[0]):  # pinned memory has a device
                cache.fused = FusedDecoding(self._fused, cache, use_graphs=self.device.type == "cuda")
        return cache.fused

    def unfused_reason(self, rows: int, cache: str | None = None) -> str | None:
        """Why decode steps of `rows` sequences on a GPU are torch operations, which take several times as long as the
        fused launches of engine/fused_step.py; None if they are fused.

        Args:
            rows: number of sequences that are decoded together.
            cache: kind of the KV cache; default: the model's.
        """
        if rows > MAX_SKINNY_ROWS:
            return f"{rows} sequences are more than {MAX_SKINNY_ROWS}"
        if (cache or self.cache_kind) == "float32":
            return "the KV cache is in float32"
        return fusion_obstacle(self.decoder) if self._fused is None else None

    @cached_property
    def _fused(self) -> FusedDecoder | None:
        if isinstance(self.decoder, TransformersDecoder) or fusion_obstacle(self.decoder) is not None:
            return None
        return fuse(self.decoder)

    def _decode_blocks(self, x: Tensor, cache: KVCache, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
        config, rows = self.decoder.attention_config, len(slots)
        if isinstance(self.decoder, TransformersDecoder) or cache.tables is None:
            return self.decoder.run_blocks(x, self.decoder.decode(config, cache, slots, lengths, self.dtype))
        if self.use_step_graphs and rows in cache.step_graphs:
            return cache.step_graphs[rows].replay(x, slots, lengths)
        attention = NativeDecodeAttention(config, cache.tables, slots, lengths)
        if not self.use_step_graphs or rows > MAX_GRAPH_ROWS:
            return self.decoder.run_blocks(x, attention)
        cache.step_graphs[rows] = StepGraph(self.decoder, x, attention)
        return cache.step_graphs[rows].hidden

    def check_ids(self, input_ids: Tensor) -> None:
        """Validate token ids.

        Raises:
            UsageError: not a matrix (B, T) of integers, empty, longer than the context, or outside the vocabulary.
        """
        if not isinstance(input_ids, Tensor) or not is_integer_dtype(input_ids.dtype):
            kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise UsageError(f"token ids are {kind}, not a tensor of integers", "Give an int64 tensor (rows, tokens).")
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise UsageError(f"token ids of shape {tuple(input_ids.shape)} cannot be run", "Give (rows, tokens).")
        if self.context is not None and input_ids.shape[1] > self.context:
            raise UsageError(f"{input_ids.shape[1]} tokens are more than this model's context of {self.context}",
                             "Give fewer tokens.")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.vocabulary_size:
            raise UsageError(f"token ids {low}..{high} are not all in the vocabulary of {self.vocabulary_size}",
                             "The tokenizer belongs to another model.")
