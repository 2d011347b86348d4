"""The packed head: one copy for lookup and product, close to the full one, in every layout and for any vocabulary."""

import numpy as np
import pytest
import torch
from conftest import naming, packed_checkpoint
from oracle_format import formula, random_words
from safetensors.torch import load_file, save_file

from gptq_belle import load
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.engine.linear import DenseLinear, PackedLinear
from gptq_belle.engine.lm_head import PackedEmbedding, embedding_and_head
from gptq_belle.engine.weight_loader import WeightLoader
from gptq_belle.errors import UsageError
from gptq_belle.formats.packed_lm_head import CLIPS, quantize_rows
from gptq_belle.kernels import cpu_layout, cpu_matmul, cpu_packed_rows, dispatch, reference, triton_layout
from gptq_belle.kernels.layout import checked_weight
from gptq_belle.kernels.native_library import NativeLibrary, load_library
from gptq_belle.models.dimensions import Dimensions

IDS = torch.tensor([[5, 300, 17, 42, 8, 250, 99, 4, 61]])
CPU = torch.device("cpu")
FOUND = load_library()
ISAS = FOUND.usable_isas if isinstance(FOUND, NativeLibrary) else ()


def kl_divergence(base, other):
    base, other = base.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((base.exp() * (base - other)).sum(-1).mean())


@pytest.mark.parametrize(("bits", "limit"), [(8, 2e-4), (4, 3e-2)])
def test_kl_divergence_of_a_packed_head_is_small(tiny_model, bits, limit):
    full = load(tiny_model, device="cpu", head_bits=16).logits(IDS)
    assert 0 < kl_divergence(full, load(tiny_model, device="cpu", head_bits=bits).logits(IDS)) < limit


def test_default_is_8_bits_for_tied_heads_of_quantized_models(tiny_bloom, tiny_llama, tmp_path):
    for source, kind in ((tiny_bloom, PackedLinear), (tiny_llama, DenseLinear)):
        model = load(packed_checkpoint(source, tmp_path / source.name), device="cpu")
        assert type(model.decoder.head) is kind
        assert type(load(source, device="cpu").decoder.head) is DenseLinear
    packed = load(tmp_path / "bloom", device="cpu").decoder
    assert packed.embedding.weight is packed.head.weight


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rounding_error_is_limited_by_the_step(bits, scale):
    matrix = torch.randn(64, 96) * scale
    codes, scales = quantize_rows(matrix, bits, 32)
    values = (codes.float() - 2 ** (bits - 1)).unflatten(1, (3, 32)) * scales.float()[..., None]
    steps = matrix.unflatten(1, (3, 32)).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (values.flatten(1) - matrix).abs().unflatten(1, (3, 32))
    assert error.mean() < 0.3 * steps.mean()
    assert error.max() <= (0.51 if bits == 8 else 1.6) * steps.max()  # with 4 bits the ends may be clipped
    assert not quantize_rows(torch.zeros(1, 32), bits, 32)[1].isnan().any()
    with pytest.raises(ValueError, match="NaN"):
        quantize_rows(torch.full((1, 32), torch.nan), bits, 32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_lookup_rows_of_every_layout_equals_the_formula(bits, act_order):
    words = random_words(bits, 128, 64, 32)
    if act_order:
        words["g_idx"] = words["g_idx"][torch.randperm(128)]
    expected, ids = formula(**words, bits=bits, v1=True), torch.tensor([3, 63, 0, 17, 17])
    weight = checked_weight(**words, bits=bits, zero_offset=1)
    for found in (cpu_packed_rows.lookup_rows(cpu_layout.prepare(weight), ids), reference.lookup_rows(weight, ids),
                  triton_layout.lookup_rows(triton_layout.prepare(weight), ids), dispatch.lookup_rows(weight, ids)):
        torch.testing.assert_close(found.double(), expected[ids], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_prepare_rows_lays_out_the_given_codes(bits, group):
    matrix = torch.randn(96, 256)
    codes, scales = quantize_rows(matrix, bits, group)
    made = cpu_packed_rows.prepare_rows(codes, scales, bits)
    x, values = torch.randn(5, 256), cpu_packed_rows.lookup_rows(made, torch.arange(96))
    assert torch.equal(cpu_layout.unpack_weight(made)[0], codes.t())
    assert (cpu_matmul.quant_matmul(x, made) - x @ values.t()).norm() < 2e-4 * (x @ values.t()).norm()
    with pytest.raises(ValueError, match=naming("(33, 256)")):
        cpu_packed_rows.prepare_rows(codes[:33], scales[:33], bits)
    with pytest.raises(ValueError, match=naming("codes")):
        cpu_packed_rows.prepare_rows(codes, scales, bits, codes=made.codes[:2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (8, 128), (4, 64), (4, 128)])
def test_native_rounding_equals_numpy(bits, group, dtype, isa):
    """The bits that NumPy computes in float32. If two clips have equal errors to the last bits, either is accepted."""
    matrix = torch.randn(67, 256) ** 3 * torch.logspace(-9, 3, 67)[:, None]  # down to float16's smallest scales
    top = 2 ** (bits - 1) - 1
    matrix[0], matrix[1, :3] = 0, torch.tensor([0.5, 1.5, -2.5])  # ties, with the scale 1
    matrix[1, 3::group] = top
    matrix = matrix.to(dtype)
    codes, scales = cpu_packed_rows.quantize_rows(matrix, bits, group, CLIPS[bits], isa=isa)
    values = matrix.float().numpy().reshape(67, -1, group)
    grids = [np.clip(np.abs(values).max(-1, keepdims=True) * np.float32(clip) / np.float32(top), np.float32(6e-8),
                     np.float32(65504)).astype(np.float16).astype(np.float32) for clip in (1, *CLIPS[bits])]
    ways = [np.clip(np.rint(values / grid), -top - 1, top) for grid in grids]
    errors = np.stack([((way * grid - values).astype(np.float64) ** 2).sum(-1)
                       for way, grid in zip(ways, grids, strict=True)])
    found = (scales.numpy()[..., None] == np.stack([grid.astype(np.float16) for grid in grids])).squeeze(-1)
    assert found.any(0).all()
    assert (np.where(found, errors, np.inf).min(0) <= errors.min(0) * (1 + 1e-5)).all()
    chosen = found.argmax(0)
    expected = np.take_along_axis(np.stack(ways), chosen[None, ..., None], 0)[0] + top + 1
    np.testing.assert_array_equal(codes.numpy().reshape(expected.shape), expected)
    if bits == 8:
        assert codes[1, :3].tolist() == [128, 130, 126]


def test_native_rounding_rejects_unsupported_matrices():
    for bad in (torch.nan, torch.inf, -torch.inf):
        matrix = torch.zeros(40, 64)
        matrix[33, 50] = bad
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            with pytest.raises(ValueError, match="NaN"):
                cpu_packed_rows.quantize_rows(matrix.to(dtype), 8, 32)
    for matrix, bits, group in ((torch.zeros(2, 64).double(), 8, 32), (torch.zeros(2, 64), 3, 32),
                                (torch.zeros(2, 96), 8, 64), (torch.zeros(2, 64), 8, 16), (torch.zeros(64), 8, 32)):
        with pytest.raises(ValueError, match="matrix|inputs"):
            cpu_packed_rows.quantize_rows(matrix, bits, group)


@pytest.mark.parametrize("bits", [4, 8])
def test_torch_rounds_like_the_native_kernel(bits, monkeypatch):
    matrix = torch.randn(96, 256).half()
    native = quantize_rows(matrix, bits, 64)
    monkeypatch.setattr("gptq_belle.kernels.cpu_packed_rows.load_library", lambda: "no compiler")
    for ours, others in zip(native, quantize_rows(matrix, bits, 64), strict=True):
        assert torch.equal(ours, others)


def head_of(path, vocabulary, width, **arguments):
    weights = WeightLoader(CheckpointReader(path), CPU, torch.float32, "exact", **arguments)
    sizes = Dimensions("bloom", 1, width, 4 * width, 2, 2, width // 2, vocabulary, True, None, None)
    return embedding_and_head(weights, "transformer.word_embeddings", sizes)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("vocabulary", [96, 100, 4099])
def test_lookup_and_product_with_vocabularies_of_any_size(tiny_bloom, tmp_path, monkeypatch, vocabulary, native):
    table = torch.randn(vocabulary, 64).half()
    (tmp_path / "config.json").write_text((tiny_bloom / "config.json").read_text())
    save_file({"transformer.word_embeddings.weight": table}, tmp_path / "model.safetensors")
    monkeypatch.setattr("gptq_belle.engine.lm_head.WEIGHTS_PER_STEP", 64 * 64)  # several steps
    if not native:
        for module in ("cpu_matmul", "cpu_packed_rows"):
            monkeypatch.setattr(f"gptq_belle.kernels.{module}.load_library", lambda: "no compiler")
    if not native and vocabulary % 32:
        with pytest.raises(UsageError, match="multiple of 32"):
            head_of(tmp_path, vocabulary, 64, head_bits=8)
        return
    look_up, head = head_of(tmp_path, vocabulary, 64, head_bits=8)
    x, ids = torch.randn(3, 64), torch.tensor([0, 5, vocabulary - 1])
    assert isinstance(look_up, PackedEmbedding)
    assert (look_up(ids) - table[ids]).norm() < 8e-3 * table[ids].float().norm()
    assert head(x).shape == (3, vocabulary)
    assert (head(x) - x @ table.float().t()).norm() < 8e-3 * (x @ table.float().t()).norm()
    assert (head(x) - x @ look_up(torch.arange(vocabulary)).t()).norm() < 1e-4 * head(x).norm()


def test_unsupported_head_bits_are_rejected(tiny_bloom):
    with pytest.raises(UsageError, match="head bits 5"):
        load(tiny_bloom, device="cpu", head_bits=5)


def test_packed_head_of_an_untied_model_keeps_its_embedding(tiny_llama):
    model = load(tiny_llama, device="cpu", head_bits=4)
    table = load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.decoder.embedding(IDS[0]), table[IDS[0]].float())
    assert model.decoder.embedding.table.dtype == torch.float16
    assert model.weight_bytes - model.step_bytes == 384 * 128 * 2
