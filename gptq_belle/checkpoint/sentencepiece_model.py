"""Convert a SentencePiece model (tokenizer.model) to a fast tokenizer that gives the same ids.

transformers 5 converts it by the name of the tokenizer class, and for an unknown name leaves out the dummy prefix. Here
the model's own normalizer settings decide, as in SentencePiece itself.
"""

from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gptq_belle.checkpoint.sentencepiece_ties import SentencePieceSegmenter, has_equal_scores
from gptq_belle.errors import InputError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5


class SentencePieceTokenizer(NamedTuple):
    """A converted SentencePiece model.

    Attributes:
        tokenizer: the fast tokenizer; it adds no special tokens.
        special_tokens: names of unk, bos and eos by their keys in tokenizer_config.json; those that the model has.
        exact: a pre-tokenizer without which the ids differ; None where none is needed. It cannot be written to a file.
    """

    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    exact: Any


def convert_sentencepiece(path: Path, *, legacy: bool = True, add_prefix_space: bool = True) -> SentencePieceTokenizer:
    """Convert a tokenizer.model.

    Args:
        path: the file.
        legacy: whether text after a special token gets a dummy prefix, too (``legacy`` of LlamaTokenizer; its default).
        add_prefix_space: whether text gets a dummy prefix at all; the model must want it as well.
    Raises:
        InputError: the file is not a SentencePiece model, or of a kind that fast tokenizers cannot represent.
    """
    model = proto.ModelProto()  # type: ignore[attr-defined]  # made at import
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError has no public name that all its versions share
        raise InputError(f"{path} is not a SentencePiece model", "Fetch the file again.") from error
    if not model.pieces:
        raise InputError(f"{path} is not a SentencePiece model", "Fetch the file again.")
    if model.normalizer_spec.escape_whitespaces is False or model.trainer_spec.treat_whitespace_as_suffix:
        raise InputError(f"{path} treats spaces in a way that is not supported",
                         "Save the tokenizer as tokenizer.json with the program that the model was trained with.")
    prefix = model.normalizer_spec.add_dummy_prefix and add_prefix_space
    tokenizer = Tokenizer(_model(model, path))
    tokenizer.normalizer = _normalizer(model.normalizer_spec, prefix and legacy, replace=legacy)
    if not legacy:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first" if prefix else "never", split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                           *strip])
    kinds = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=kinds[piece.type])
                          for piece in model.pieces if piece.type in kinds])
    exact = None
    if model.trainer_spec.model_type == BPE and has_equal_scores(model):
        cutter = pre_tokenizers.PreTokenizer.custom(SentencePieceSegmenter(model))
        exact = cutter if legacy else pre_tokenizers.Sequence([tokenizer.pre_tokenizer, cutter])
    return SentencePieceTokenizer(tokenizer, _special_tokens(model), exact)


def _model(model: Any, path: Path) -> Any:
    spec = model.trainer_spec
    if spec.model_type == UNIGRAM:
        return models.Unigram([(piece.piece, piece.score) for piece in model.pieces], spec.unk_id, spec.byte_fallback)
    if spec.model_type == BPE:
        vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
        if len(vocabulary) != len(model.pieces):
            raise InputError(f"{path} holds a piece twice", "Fetch the file again.")
        unknown = next((piece.piece for piece in model.pieces if piece.type == UNKNOWN), None)
        return models.BPE(vocabulary, _merges(model, vocabulary), unk_token=unknown, fuse_unk=True,
                          byte_fallback=spec.byte_fallback, ignore_merges=has_equal_scores(model))
    raise InputError(f"{path} is a SentencePiece model that is neither BPE nor unigram",
                     "Save the tokenizer as tokenizer.json with the program that the model was trained with.")


def _merges(model: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that form another piece, in the order in which SentencePiece merges them: by score.

    Where pieces share a score, `sentencepiece_ties` gives the order.
    """
    mergeable = {piece.piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED)}
    merges = []
    for piece in model.pieces:
        whole = piece.piece
        if piece.type not in (NORMAL, UNUSED):
            continue
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in mergeable and right in mergeable:
                merges.append((-piece.score, vocabulary[whole], cut, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _normalizer(spec: Any, prefix: bool, *, replace: bool) -> normalizers.Normalizer | None:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Not `Strip`, which removes line breaks as well.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix:
        steps.append(normalizers.Prepend(SPACE))
    if replace:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps) if steps else None


def _special_tokens(model: Any) -> dict[str, str]:
    spec, count = model.trainer_spec, len(model.pieces)
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id}
    return {key: model.pieces[index].piece for key, index in ids.items() if 0 <= index < count}
