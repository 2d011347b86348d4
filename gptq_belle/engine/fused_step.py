"""One decode step on a GPU as a list of launches on static buffers: 5 per block, one before and 1 or 2 after.

    embedding     tokens -> stream, input of the first block
    qkv           norm, product, bias
    attention     rotary positions or ALiBi, append to the KV cache, attention over all slots
    out           product, bias, residual -> stream, input of `up`
    up            norm, product, bias, GELU or SiLU(gate) * value
    down          product, bias, residual -> stream, input of the next block
    head          last norm, logits, next tokens, lengths + 1
    sampling      only in a step with sampling, whose head writes what this launch selects the next tokens from

No torch operation, no allocation and no value from the host is between them, so a CUDA graph can record them. What
differs from step to step (tokens, slots, lengths, random numbers) is in buffers on the device.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gptq_belle.engine.fused_decoder import FusedBlock, FusedDecoder, FusedProduct
from gptq_belle.engine.fused_sampling import state_of_rows
from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.kernels import triton_attention, triton_embedding, triton_head
from gptq_belle.kernels.triton_attention import HeadLayout, attention_launch
from gptq_belle.kernels.triton_config import ROW_BUCKETS, TileConfig, skinny_config
from gptq_belle.kernels.triton_embedding import embedding_launch
from gptq_belle.kernels.triton_head import head_launches
from gptq_belle.kernels.triton_launch import Launch, Workspace
from gptq_belle.kernels.triton_matmul import device_properties, plan_for, problem_of
from gptq_belle.kernels.triton_norm import FoldedNorm, NextNorm
from gptq_belle.kernels.triton_sampling import new_sampling_state
from gptq_belle.kernels.triton_skinny_launch import skinny_launch, skinny_workspace

SMALLEST_TILE = 32  # columns of a tile of moments
INPUTS = ("qkv", "out", "up", "down")


class StepBuffers:
    """Memory of the decode steps on one KV cache, for at most `rows` rows; steps of fewer rows use the beginning of it.

    Attributes:
        tokens, slots, lengths: (rows,) int32: the input token of each row, its slot, and the number of tokens in the
            slot; -1 for an idle row. The step replaces tokens and lengths by those of the next step.
        stream: (rows, width); qkv: (rows, outputs of qkv); logits: (rows, V) float32.
        sampling: parameters and buffers of sampling, about 5 bytes * rows * V. They exist from the beginning, because
            the product's defaults sample, and no request shall fail later for lack of memory.
    """

    def __init__(self, decoder: FusedDecoder, cache: KVCache, rows: int) -> None:
        self.decoder, self.cache, self.rows = decoder, cache, rows
        self.device, self.dtype = decoder.head.gamma.device, decoder.head.gamma.dtype
        self.state = self._new(3, -(-rows // 4) * 4, dtype=torch.int32)[:, :rows]  # each aligned to 16 bytes
        self.tokens, self.slots, self.lengths = self.state
        self.stream = self._new(rows, decoder.width)
        self.qkv = self._new(rows, decoder.blocks[0].qkv.weight.out_features)
        self.logits = self._new(rows, _outputs(decoder), dtype=torch.float32)
        self.sampling = new_sampling_state(rows, self.logits.shape[1], cache.capacity, self.device)
        self.moments = self._new(2 * rows * -(-decoder.width // SMALLEST_TILE), dtype=torch.float32)
        head = decoder.head.weight
        self.head_input = self._new(rows, decoder.width if isinstance(head, Tensor) else head.places)
        self.inputs = self._product_inputs()
        heads = decoder.attention
        self.layout = HeadLayout(heads.heads, heads.kv_heads, heads.head_dim, decoder.interleaved_heads)
        self.rotation = self._rotation(cache.capacity)
        self.workspace = self._workspace()

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def _product_inputs(self) -> list[dict[str, Tensor]]:
        """The input (rows, K') of each product of each block.

        Blocks share them, except where padding is between the inputs of an act-order weight: it has to stay 0.
        """
        shared: dict[tuple[str, int], Tensor] = {}
        found = []
        for block in self.decoder.blocks:
            products = {name: getattr(block, name) for name in INPUTS}
            found.append({name: self._input(shared, name, product) for name, product in products.items()})
        return found

    def _input(self, shared: dict[tuple[str, int], Tensor], name: str, product: FusedProduct) -> Tensor:
        places = product.weight.places
        if places != product.weight.in_features:
            return self._new(self.rows, places)
        if (name, places) not in shared:
            shared[name, places] = self._new(self.rows, places)
        return shared[name, places]

    def _rotation(self, positions: int) -> Tensor | None:
        """Cosines, then sines, of all positions (positions, head_dim) float32; None without rotary embeddings."""
        frequencies = self.decoder.attention.frequencies
        if frequencies is None:
            return None
        angles = torch.arange(positions, device=self.device)[:, None].float() * frequencies
        return torch.cat((angles.cos(), angles.sin()), 1)

    def _workspace(self) -> Workspace:
        """Memory for the largest launch of any step."""
        products = [getattr(block, name) for block in self.decoder.blocks for name in INPUTS]
        sizes = [skinny_workspace(rows, product.weight.out_features, product_config(product, rows, self.dtype))
                 for product in products for rows in {min(most, self.rows) for most in ROW_BUCKETS}]
        sizes += [triton_attention.workspace_size(self.rows, self.layout, self.cache.capacity),
                  triton_head.workspace_size(self.rows)]
        sums, tickets = (max(numbers) for numbers in zip(*sizes, strict=True))
        return Workspace(self._new(max(sums, 1), dtype=torch.float32), self._new(max(tickets, 1), dtype=torch.int32))


class FusedStep:
    """The launches of one decode step.

    Args:
        buffers: memory of the steps, and their KV cache.
        rows: number of rows, at most `buffers.rows`.
        length: most tokens in a slot, the new one included.
        is_sampled: sample as `buffers.sampling` says; otherwise the most likely tokens follow.
        pdl: programmatic dependent launch, for compute capability 9.0 and newer.
    Attributes:
        launches: in their order.
    """

    def __init__(self, buffers: StepBuffers, rows: int, length: int, is_sampled: bool = False, *,
                 pdl: bool = False) -> None:
        self.buffers, self.rows, self.length, self.pdl = buffers, rows, length, pdl
        self.sampling = state_of_rows(buffers.sampling, rows) if is_sampled else None
        self.launches = list(self._launches())
        self._bound: list[Callable[[], object]] = []

    def run(self) -> None:
        """Make all launches."""
        if not self._bound:
            self._bound = [launch.bind() for launch in self.launches]
            return
        for start in self._bound:
            start()

    def _launches(self) -> Iterator[Launch]:
        b, decoder, rows = self.buffers, self.buffers.decoder, self.rows
        stream, first = b.stream[:rows], decoder.blocks[0]
        after = self._next_norm(first.attention_gamma, first.qkv.places, b.inputs[0]["qkv"], triton_embedding.TILE)
        yield embedding_launch(b.tokens[:rows], decoder.embedding, decoder.embedding_norm, stream, after, pdl=self.pdl)
        norm = self._folded(after, triton_embedding.TILE)
        for index, block in enumerate(decoder.blocks):
            x = b.inputs[index]
            yield self._product(block.qkv, x["qkv"], b.qkv, norm=norm)
            yield self._attention(index, block)
            tile = self._config(block.out).BN
            after = self._next_norm(block.mlp_gamma, block.up.places, x["up"], tile)
            yield self._product(block.out, x["out"], stream, residual=stream, next_norm=after)
            yield self._product(block.up, x["up"], x["down"], norm=self._folded(after, tile), places=block.down.places,
                                activation=decoder.activation)
            tile = self._config(block.down).BN
            after = self._after_block(index, tile)
            yield self._product(block.down, x["down"], stream, residual=stream, next_norm=after)
            norm = self._folded(after, tile)
        head = decoder.head
        yield from head_launches(b.head_input[:rows], head.weight, head.bias,
                                 norm._replace(gamma_product=head.gamma_product), b.logits[:rows], b.tokens[:rows],
                                 b.lengths[:rows], b.workspace, self.sampling, pdl=self.pdl)

    def _after_block(self, index: int, tile: int) -> NextNorm:
        """What is written for the first norm of the next block, or for the last norm."""
        b = self.buffers
        if index + 1 == len(b.decoder.blocks):
            return self._next_norm(b.decoder.head.gamma, None, b.head_input, tile)
        block = b.decoder.blocks[index + 1]
        return self._next_norm(block.attention_gamma, block.qkv.places, b.inputs[index + 1]["qkv"], tile)

    def _next_norm(self, gamma: Tensor, places: Tensor | None, x: Tensor, tile: int) -> NextNorm:
        tiles = -(-len(gamma) // tile)
        moments = self.buffers.moments[: 2 * tiles * self.rows].view(2, tiles, self.rows)
        return NextNorm(gamma, places, x[: self.rows], moments)

    def _folded(self, written: NextNorm, tile: int) -> FoldedNorm:
        return FoldedNorm(written.moments, None, self.buffers.decoder.eps, self.buffers.decoder.width, tile)

    def _config(self, product: FusedProduct) -> TileConfig:
        return product_config(product, self.rows, self.buffers.dtype)

    def _product(self, product: FusedProduct, x: Tensor, out: Tensor, *, norm: FoldedNorm | None = None,
                 residual: Tensor | None = None, activation: str = "none", places: Tensor | None = None,
                 next_norm: NextNorm | None = None) -> Launch:
        if norm is not None:
            norm = norm._replace(gamma_product=product.gamma_product)
        return skinny_launch(x[: self.rows], product.weight, out[: self.rows], self._config(product),
                             self.buffers.workspace, bias=product.bias, residual=residual, activation=activation,
                             places=places, norm=norm, next_norm=next_norm, pdl=self.pdl)

    def _attention(self, index: int, block: FusedBlock) -> Launch:
        b, rows = self.buffers, self.rows
        cache, scales = b.cache, b.cache.scales(index) or (None, None)
        return attention_launch(b.qkv[:rows], (cache.keys[index], cache.values[index], *scales), b.slots[:rows],
                                b.lengths[:rows], b.inputs[index]["out"][:rows], b.workspace, b.layout,
                                rotation=b.rotation, slopes=b.decoder.attention.slopes, places=block.out.places,
                                bucket=self.length, pdl=self.pdl)


def product_config(product: FusedProduct, rows: int, dtype: torch.dtype) -> TileConfig:
    """The tile of a product of up to MAX_SKINNY_ROWS rows: that of its plan, if it is for the kernel for few rows."""
    kernel, config = plan_for(product.weight, rows, dtype)
    if kernel != "skinny" or config is None:
        config = skinny_config(problem_of(product.weight, rows, dtype), *device_properties(product.weight.words.device))
    return config._replace(SPLIT_K=min(config.SPLIT_K, product.weight.words.shape[0]))


def _outputs(decoder: FusedDecoder) -> int:
    weight = decoder.head.weight
    return weight.shape[0] if isinstance(weight, Tensor) else weight.out_features
