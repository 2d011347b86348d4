"""Which programs read which kinds of directories that gptq_belle writes: one table, with its evidence.

README, docs/scale-out.md and model cards are written from this table, and `quantize --for` chooses settings by it. What
is not in the table has not been tried.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

QUERY_KEY_VALUE = "query_key_value"  # BLOOM's linear of queries, keys and values
KINDS = {  # properties of a directory, in English and Chinese; several may hold for one directory
    "4 bit": ("4 bits, symmetric, any group size, either preset", "4 位、对称、任意分组大小、任一预设"),
    "BLOOM": (f"BLOOM, `{QUERY_KEY_VALUE}` quantized (the default)", f"BLOOM，量化 `{QUERY_KEY_VALUE}`（默认）"),
    "8 bit": ("`--bits 8`", "`--bits 8`"),
    "2 bit": ("`--bits 2`", "`--bits 2`"),
    "3 bit": ("`--bits 3`", "`--bits 3`"),
    "asymmetric": ("`--asym` (`gptq_v2`)", "`--asym`（`gptq_v2`）"),
    "act-order": ("`--act-order`", "`--act-order`"),
    "skip": ("`--override '...=skip'`, alike in all blocks", "`--override '...=skip'`，各块一致"),
    "dynamic": ("`--override` otherwise, `--auto-bits`", "其他 `--override`，以及 `--auto-bits`"),
    "packed head": ("`--packed-head-only`", "`--packed-head-only`"),
}
RUN, READ, REPORTED = "run", "read", "reported"  # a program was run, its source was read, or others saw it


class Verdict(NamedTuple):
    """What a reader does with a kind."""

    takes: bool
    evidence: str  # RUN, READ or REPORTED
    why: str = ""  # what happens instead, or a condition


class Reader(NamedTuple):
    """A program, the version that was examined, and its verdicts by kind."""

    name: str
    version: str
    verdicts: Mapping[str, Verdict]


def _takes(evidence: str, *kinds: str) -> dict[str, Verdict]:
    return {kind: Verdict(True, evidence) for kind in kinds}


def _not(evidence: str, why: str, *kinds: str) -> dict[str, Verdict]:
    return {kind: Verdict(False, evidence, why) for kind in kinds}


_MISSES = "it misses a tensor and stops"
_WRONG_AXIS = f"it re-packs {QUERY_KEY_VALUE} along the wrong dimension and stops"
_SETTINGS = "it knows one setting for all linears"
READERS = {
    "transformers": Reader("transformers with optimum", "5.23.0", {
        **_takes(RUN, "4 bit", "BLOOM", "8 bit", "asymmetric", "act-order", "2 bit", "3 bit", "skip"),
        **_not(RUN, "it does not read dynamic: sizes differ, and it stops", "dynamic"),
        **_not(RUN, "it warns and runs with a random lm_head", "packed head")}),
    "GPTQModel": Reader("GPTQModel", "7.7.0", {
        **_takes(RUN, "4 bit", "BLOOM", "8 bit", "asymmetric", "act-order"), **_takes(READ, "skip", "dynamic")}),
    "AutoGPTQ": Reader("AutoGPTQ", "0.7.1", {
        **_takes(RUN, "4 bit", "8 bit", "act-order"),
        "BLOOM": Verdict(True, RUN, "with a copy of the embedding as lm_head.weight"),
        **_not(RUN, "it reads zero points one too high; convert --format gptq first", "asymmetric"),
        **_not(READ, _SETTINGS, "skip", "dynamic"), **_not(READ, _MISSES, "packed head")}),
    "vllm": Reader("vLLM on GPUs", "0.33.0", {
        **_takes(READ, "4 bit", "8 bit", "skip"),
        "dynamic": Verdict(True, READ, "if they are symmetric with 4 or 8 bits"),
        **_not(READ, _WRONG_AXIS, "BLOOM"),
        **_not(READ, "its kernels are for symmetric weights of 4 or 8 bits", "2 bit", "3 bit", "asymmetric"),
        **_not(READ, "it no longer supports desc_act with groups", "act-order"),
        **_not(READ, _MISSES, "packed head")}),
    "vLLM on a CPU": Reader("vLLM on a CPU", "0.32.0", {
        **_takes(RUN, "4 bit", "skip"), **_not(RUN, _WRONG_AXIS, "BLOOM"),
        **_not(RUN, "its kernel is for 4 bits", "8 bit", "2 bit", "3 bit"),
        **_not(RUN, "it refuses linears of other than 4 bits", "dynamic"),
        **_not(RUN, "it refuses the settings", "asymmetric", "act-order"), **_not(RUN, _MISSES, "packed head")}),
    "llama.cpp": Reader("llama.cpp's converter", "llama-cpp-python 0.3.36", {
        **_takes(RUN, "4 bit", "8 bit", "2 bit", "asymmetric", "act-order"), **_takes(READ, "BLOOM", "skip"),
        **_not(RUN, "it has no 3 bits", "3 bit"), **_not(RUN, "it does not read dynamic and stops", "dynamic"),
        **_not(RUN, "it does not know the tensors and stops", "packed head")}),
    "SGLang": Reader("SGLang on GPUs", "at 006d0961", {
        **_takes(READ, "4 bit", "8 bit", "dynamic"), **_not(REPORTED, "it has no BLOOM", "BLOOM")}),
    "SGLang on a CPU": Reader("SGLang on a CPU", "", _not(REPORTED, "it ignores dynamic", "dynamic")),
    "TGI": Reader("TGI", "at 05d0aa67", _not(READ, "it ignores dynamic", "dynamic")),
    "OpenVINO": Reader("OpenVINO", "at 01da3a33", {
        **_takes(READ, "4 bit"), **_not(READ, "it ignores g_idx: the weights are wrong", "act-order"),
        **_not(READ, "its kernel is for 4 bits", "8 bit", "2 bit", "3 bit"),
        **_not(READ, "it reads zero points one too high", "asymmetric")}),
}
TARGETS = {"vllm": ("vllm",), "transformers": ("transformers",), "llama.cpp": ("llama.cpp",),
           "any": ("vllm", "transformers", "llama.cpp")}  # what `quantize --for` takes, and the readers meant


def kinds_of(settings: Mapping[str, Any], model_type: str, *, alike: bool) -> list[str]:
    """The kinds of a directory in the order of KINDS.

    Args:
        settings: settings of its job, ``asdict(QuantConfig)``.
        alike: whether the same linears are quantized in all blocks.
    """
    overrides = settings["overrides"]
    skipped = [override["pattern"] for override in overrides if override["skip"]]
    others = [override for override in overrides if not override["skip"]]
    holds = {
        "BLOOM": model_type == "bloom" and not any(QUERY_KEY_VALUE in pattern for pattern in skipped),
        "asymmetric": not settings["sym"] or any(override["sym"] is False for override in others),
        "act-order": settings["act_order"], "skip": bool(skipped) and alike,
        "dynamic": bool(others or settings["auto_bits"] or (skipped and not alike)),
        "packed head": settings["head_bits"] != 16,
        **{f"{bits} bit": True for bits in (settings["bits"], *(override["bits"] for override in others))},
    }
    return [kind for kind in KINDS if holds.get(kind)]


def obstacle(reader: Reader, kinds: Iterable[str]) -> str | None:
    """Why a reader does not take a directory of these kinds; None if it takes all, or has not been tried with some."""
    return next((found.why for kind in kinds if (found := reader.verdicts.get(kind)) and not found.takes), None)


def takers(kinds: Iterable[str]) -> list[Reader]:
    """The readers that take a directory of these kinds; one that was not tried with any of them is not listed."""
    kinds = list(kinds)
    return [reader for reader in READERS.values()
            if all((found := reader.verdicts.get(kind)) and found.takes for kind in kinds)]


def conditions(reader: Reader, kinds: Iterable[str]) -> list[str]:
    """Under which conditions a reader takes a directory of these kinds."""
    return [found.why for kind in kinds if (found := reader.verdicts.get(kind)) and found.takes and found.why]


def refusers(kinds: Iterable[str]) -> list[tuple[Reader, str]]:
    """The readers that refuse or misread a directory of these kinds, and why."""
    kinds = list(kinds)
    return [(reader, why) for reader in READERS.values() if (why := obstacle(reader, kinds)) is not None]
