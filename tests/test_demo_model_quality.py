"""Quality of the trained demo models in 8 and 4 bits: KL divergence of GPTQ and of rounding to nearest."""

from pathlib import Path

import pytest

import gptq_belle
from gptq_belle.evaluation.kl_divergence import divergence
from gptq_belle.evaluation.perplexity import read_text

TINY = Path(__file__).resolve().parent.parent / "examples" / "belle_tiny"
WINDOW, TOKENS = 256, 2000


@pytest.fixture(scope="module", params=["bloom", "llama"])
def kl(request, tmp_path_factory):
    """A function from (bits, method) to the mean KL of one demo model to full precision."""
    source = TINY / request.param
    base = gptq_belle.load(source)
    text = read_text(TINY / "data" / "heldout.jsonl", base.chat_format())

    def measure(bits, method):
        out = tmp_path_factory.mktemp("trained") / "out"
        gptq_belle.quantize_checkpoint(source, out, gptq_belle.QuantConfig(bits=bits, method=method),
                                       calibration=gptq_belle.Calibration(rows=16, seq_len=WINDOW))
        model = gptq_belle.load(out)
        return divergence(base.logits, model.logits, base.tokenizer, text, length=WINDOW, limit=TOKENS).kl_mean

    return measure


def test_8_bit_kl_is_below_one_thousandth(kl):
    assert kl(8, "gptq") < 1e-3


def test_4_bit_gptq_kl_is_at_most_0_7_of_rounding(kl):
    assert kl(4, "gptq") <= 0.7 * kl(4, "rtn")
