"""A checkpoint's weights for the decoders of `gptq_belle.models`, each read once and straight to its place.

Packed linears that meet the same activations (query, key, value; gate, up) are laid side by side where their groups
and bits allow, so that one product serves them.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from gptq_belle.checkpoint.empty_model import wrong_shape
from gptq_belle.checkpoint.packed_reader import read_packed_linear, read_quantization
from gptq_belle.checkpoint.prefetch import BlockPrefetch
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.engine.linear import ConcatenatedLinear, DenseLinear, LinearOperator, PackedLinear
from gptq_belle.errors import InputError
from gptq_belle.kernels.dispatch import prepare_weight
from gptq_belle.kernels.layout import CanonicalWeight, fuse
from gptq_belle.models.architectures import COMPUTED_SUFFIXES


class WeightLoader:
    """What a model directory holds, handed out by name.

    Args:
        reader: the directory.
        device: where weights are to live.
        dtype: of activations and of weights that are not packed.
        precision: "exact" or "fast", as `engine.hf_model.hf_model` has it.
        head_bits: 16, 8, 4 or None, as `engine.lm_head.embedding_and_head` has it.
    Attributes:
        nbytes: of everything handed out so far, as it lies in memory.
        native: whether activations are float32, and all linears so far are products of `kernels.cpu_matmul`.
    """

    def __init__(self, reader: CheckpointReader, device: torch.device, dtype: torch.dtype, precision: str,
                 head_bits: int | None = None) -> None:
        self.reader, self.device, self.dtype, self.precision = reader, device, dtype, precision
        self.head_bits = head_bits
        self.quantization = read_quantization(reader)
        self.nbytes = 0
        self.native = dtype is torch.float32
        self._used: set[str] = set()
        self._prefetch: BlockPrefetch | None = None

    def in_turn(self, prefix: str, count: int) -> Iterator[str]:
        """The names of blocks, prefix.0 and on; while one's tensors are laid out, next ones are read."""
        with closing(BlockPrefetch(self.reader, prefix, count)) as self._prefetch:
            yield from (f"{prefix}.{index}" for index in range(count))

    def tensor(self, name: str, *shape: int, narrow: bool = False) -> Tensor:
        """A floating point tensor of that shape on the device, in the dtype of activations.

        Args:
            narrow: leave it in the dtype of the file where that is the smaller one.
        Raises:
            InputError: as `expect`.
        """
        kind = self.expect(name, *shape)
        dtype = kind if narrow and kind.itemsize < self.dtype.itemsize else self.dtype
        tensor = self._taken(name).to(self.device, dtype)
        self.nbytes += tensor.nbytes
        return tensor

    def expect(self, name: str, *shape: int) -> torch.dtype:
        """The dtype of a floating point tensor of that shape, which counts as used from now on.

        Raises:
            InputError: it is missing, or of another shape or kind.
        """
        found, kind = self.reader.shape(name), self.reader.dtype(name)
        if found != shape:
            raise wrong_shape(name, found, shape)
        if not kind.is_floating_point:
            raise InputError(f"{self.reader.path}: tensor {name} is {kind}, not floating point",
                             "Only GPTQ's packed linears and plain floating point weights can be read.")
        self._used.add(name)
        return kind

    def linear(self, names: Sequence[str], inputs: int, outputs: Sequence[int], biased: bool) -> LinearOperator:
        """One or several linears that meet the same activations, their outputs one after another.

        Args:
            names: of the linears, in full.
            inputs: of each.
            outputs: of each in turn.
            biased: whether they have biases; some writers store zeros where a model has none, which are added.
        Raises:
            InputError: tensors that are missing or do not fit; the linear is named.
        """
        product = self._linear(names, inputs, outputs, biased)
        self.native &= isinstance(product, PackedLinear) and product.native
        return product

    def _linear(self, names: Sequence[str], inputs: int, outputs: Sequence[int], biased: bool) -> LinearOperator:
        packed = [self.reader.is_packed(name) for name in names]
        biases = [self.bias(name, size, biased) for name, size in zip(names, outputs, strict=True)]
        if not any(packed):
            return DenseLinear(self._together(names, inputs, outputs), self._joined(biases, outputs))
        if all(packed):
            words = [self.packed(name, inputs, size) for name, size in zip(names, outputs, strict=True)]
            try:
                together = fuse(words) if len(words) > 1 else words[0]
            except ValueError:  # other bits, groups or formats: side by side in a sum only
                return ConcatenatedLinear([self._packed(word, bias) for word, bias in zip(words, biases, strict=True)])
            return self._packed(together, self._joined(biases, outputs))
        parts = [self._linear([name], inputs, [size], biased) for name, size in zip(names, outputs, strict=True)]
        return ConcatenatedLinear([part for part in parts if not isinstance(part, ConcatenatedLinear)])

    def _together(self, names: Sequence[str], inputs: int, outputs: Sequence[int]) -> Tensor:
        """The weights of linears (sum of outputs, inputs), one below the other."""
        if len(names) == 1:
            return self.tensor(f"{names[0]}.weight", outputs[0], inputs)
        whole = torch.empty(sum(outputs), inputs, device=self.device, dtype=self.dtype)
        for name, part in zip(names, whole.split(list(outputs)), strict=True):
            self.expect(f"{name}.weight", *part.shape)
            part.copy_(self._taken(f"{name}.weight"))
        self.nbytes += whole.nbytes
        return whole

    def check_all_used(self) -> None:
        """Raises InputError where the directory holds tensors that nobody asked for."""
        extra = [name for name in self.reader if name not in self._used and not name.endswith(COMPUTED_SUFFIXES)]
        if extra:
            raise InputError(f"{self.reader.path} holds {len(extra)} tensors that the model has no place for, "
                             f"such as {extra[0]}", "config.json belongs to another model, or the kind is unsupported.")

    def mark_used(self, name: str) -> None:
        """`name` was read in another way."""
        self._used.add(name)

    def packed(self, name: str, inputs: int, outputs: int) -> CanonicalWeight:
        """One packed linear as the file stores it; raises InputError as `read_packed_linear`."""
        return read_packed_linear(self.reader, self.quantization, name, inputs, outputs, self._stored)

    def bias(self, name: str, size: int, needed: bool, *, narrow: bool = False) -> Tensor | None:
        """The bias of a linear, as `tensor`; some writers store zeros where a model has none."""
        present = needed or f"{name}.bias" in self.reader
        return self.tensor(f"{name}.bias", size, narrow=narrow) if present else None

    def _packed(self, words: CanonicalWeight, bias: Tensor | None) -> PackedLinear:
        prepared = prepare_weight(words, device=self.device, dtype=self.dtype, precision=self.precision)
        self.nbytes += sum(value.nbytes for value in prepared._asdict().values() if isinstance(value, Tensor))
        return PackedLinear(prepared, bias)

    def _joined(self, biases: Sequence[Tensor | None], outputs: Sequence[int]) -> Tensor | None:
        if all(bias is None for bias in biases):
            return None
        return torch.cat([torch.zeros(size, device=self.device, dtype=self.dtype) if bias is None else bias
                          for bias, size in zip(biases, outputs, strict=True)])

    def _stored(self, name: str) -> Tensor:
        self._used.add(name)
        return self._taken(name)

    def _taken(self, name: str) -> Tensor:
        early = None if self._prefetch is None else self._prefetch.take(name)
        return self.reader.tensor(name) if early is None else early
