"""The embedding and the head: one matrix (V, H) for both where they are tied, looked up by row and multiplied by."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_belle.models.registry import HEAD
from gptq_belle.models.shapes import Dimensions
from gptq_belle.runtime.weights import Dense, Product, Weights


@dataclass(slots=True)
class Lookup:
    """Token ids (n,) to embeddings (n, H) in the dtype of activations; the table stays in that of the file."""

    table: Tensor
    dtype: torch.dtype
    extra_bytes: int  # of the table, where it is not also the head

    def __call__(self, ids: Tensor) -> Tensor:
        return self.table[ids].to(self.dtype)


def embedding_and_head(weights: Weights, name: str, sizes: Dimensions) -> tuple[Lookup, Product]:
    """What turns ids into hidden states, and hidden states into logits.

    Args:
        weights: of the checkpoint.
        name: of the embedding.
        sizes: of the model; where it says tied and the file holds another head all the same, the file is believed.
    Raises:
        InputError: a matrix is missing or of another shape.
    """
    shape, stored = (sizes.vocabulary, sizes.width), f"{HEAD}.weight"
    if sizes.tied and (stored not in weights.reader or _same(weights, f"{name}.weight", stored)):
        weights.mark_used(stored)
        table = weights.tensor(f"{name}.weight", *shape)
        return Lookup(table, weights.dtype, 0), Dense(table, None)
    narrow = weights.reader.dtype(f"{name}.weight") if f"{name}.weight" in weights.reader else None
    table = weights.tensor(f"{name}.weight", *shape, dtype=narrow)
    return Lookup(table, weights.dtype, table.nbytes), Dense(weights.tensor(stored, *shape), None)


def _same(weights: Weights, first: str, second: str) -> bool:
    reader = weights.reader
    if reader.shape(first) != reader.shape(second):
        return False
    return all(torch.equal(a.float(), b.float()) for a, b in zip(reader.chunks(first), reader.chunks(second),
                                                                 strict=False))
