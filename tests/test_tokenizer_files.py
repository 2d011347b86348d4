"""Tokenizers of model directories: the ids are those of training, and readers of the output get the same."""

import json
import shutil

import pytest
from conftest import SENTENCES, VOCABULARY, naming
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece import sentencepiece_model_pb2 as proto
from transformers import AutoTokenizer

from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.checkpoint.sentencepiece_model import convert_sentencepiece
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.engine.model import load
from gptq_belle.errors import InputError
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.pipeline import quantize_checkpoint

BOS, EOS = 1, 2
TEXTS = ["你好", "Human: hi  there \n\nAssistant: ", "  two spaces", " ", "\n", "龘😀", "", *SENTENCES]


def train(path, **options):
    """Train a small SentencePiece model with LLaMA's settings unless others are given."""
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False} | options
    with path.open("wb") as file:
        SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES), model_writer=file, vocab_size=VOCABULARY,
                                   hard_vocab_limit=False, character_coverage=0.98, minloglevel=2, **settings)
    return SentencePieceProcessor(str(path))


@pytest.fixture
def model(tiny_llama, tmp_path):
    """A model directory without a tokenizer."""
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    return path


def edit(path, drop=(), **values):
    """Change keys of a JSON file."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({key: value for key, value in found.items() if key not in drop} | values))


def quantized(model):
    """The directory that quantize writes, which every other command reads."""
    out = model.with_name("out")
    quantize_checkpoint(model, out, QuantConfig(method="rtn"))
    assert inspect(out).problems == []
    load(out, device="cpu").generate("你好", prompt_style="auto", max_new_tokens=2)
    return out


@pytest.mark.parametrize("options", [
    {}, {"model_type": "unigram"}, {"add_dummy_prefix": False}, {"byte_fallback": False},
    {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    {"model_type": "unigram", "remove_extra_whitespaces": True, "user_defined_symbols": ["，"]},
])
def test_converted_sentencepiece_model_gives_its_ids(tmp_path, options):
    pieces = train(tmp_path / "tokenizer.model", **options)
    tokenizer = convert_sentencepiece(tmp_path / "tokenizer.model").tokenizer
    assert [tokenizer.encode(text).ids for text in TEXTS] == [pieces.encode(text) for text in TEXTS]


def test_merges_follow_scores_and_not_ids(tmp_path):
    train(path := tmp_path / "tokenizer.model")
    extended = proto.ModelProto()
    extended.ParseFromString(path.read_bytes())
    pieces = {piece.piece for piece in extended.pieces}
    assert not pieces & {"介绍", "绍一"}
    extended.pieces.add(piece="绍一", score=-1e6)
    extended.pieces.add(piece="介绍", score=1.0)
    path.write_bytes(extended.SerializeToString())
    expected = SentencePieceProcessor(str(path)).encode("请介绍一下")
    assert convert_sentencepiece(path).tokenizer.encode("请介绍一下").ids == expected


@pytest.mark.parametrize("legacy", [True, False])
def test_pieces_of_equal_score_are_merged_as_by_sentencepiece(model, legacy):
    """Vocabularies that were extended without scores, as Chinese-LLaMA's, cannot be written as a tokenizer.json."""
    train(path := model / "tokenizer.model")
    extended = proto.ModelProto()
    extended.ParseFromString(path.read_bytes())
    for piece, text in zip(extended.pieces[-2:], ("绍一", "介绍"), strict=True):  # the leftmost has the larger id
        piece.piece, piece.score = text, 1.0
    path.write_bytes(extended.SerializeToString())
    edit(model / "tokenizer_config.json", legacy=legacy)
    texts = [*TEXTS[:2], *SENTENCES, "", "<0x0A>", "龘😀龘 a", "".join(SENTENCES) * 40]
    expected = [[BOS, *SentencePieceProcessor(str(path)).encode(text)] for text in texts]
    fast = convert_sentencepiece(path, legacy=legacy).tokenizer
    assert [[BOS, *fast.encode(text).ids] for text in texts] != expected
    out = quantized(model)
    for reader in (load_tokenizer(model), load_tokenizer(out)):
        assert reader(texts, verbose=False)["input_ids"] == expected
    assert AutoTokenizer.from_pretrained(out)(SENTENCES[0])["input_ids"][0] == BOS
    notes = json.loads((out / "quantization_report.json").read_text())["notes"]
    assert any("tokenizer.model" in note for note in notes)


@pytest.mark.parametrize("config", [
    None,
    {"tokenizer_class": "LLaMATokenizer"},
    {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True},
    {"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": "", "unk_token": ""},
    {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}},
    {"tokenizer_class": None, "eos_token": {"content": "</s>", "__type": "AddedToken"}},
])
def test_sentencepiece_ids_do_not_depend_on_the_class_name(model, config):
    pieces = train(model / "tokenizer.model")
    if config is not None:
        edit(model / "tokenizer_config.json", **config)
    expected = [[BOS, *pieces.encode(text)] for text in TEXTS]
    assert load_tokenizer(model)(TEXTS)["input_ids"] == expected
    out = quantized(model)
    assert load_tokenizer(out)(TEXTS)["input_ids"] == expected
    assert AutoTokenizer.from_pretrained(out)(TEXTS)["input_ids"] == expected


def test_text_after_a_special_token_follows_legacy(model):
    pieces = train(model / "tokenizer.model")
    for legacy, prefix in ((None, True), (True, True), (False, False)):
        edit(model / "tokenizer_config.json", legacy=legacy)
        after = load_tokenizer(model)("</s>Human", add_special_tokens=False)["input_ids"]
        assert after[0] == EOS
        assert (after[1:] == pieces.encode("Human")) is prefix


def test_bos_is_not_added_where_the_configuration_says_so(model):
    pieces = train(model / "tokenizer.model")
    edit(model / "tokenizer_config.json", add_bos_token=False)
    out = quantized(model)
    for tokenizer in (load_tokenizer(model), load_tokenizer(out), AutoTokenizer.from_pretrained(out)):
        assert tokenizer("你好")["input_ids"] == pieces.encode("你好")


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("stated", [True, False])
def test_eos_of_a_saved_post_processor_is_not_added(tiny_llama, tmp_path, add_bos, stated):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_bos_token, tokenizer.add_eos_token = add_bos, True
    tokenizer.save_pretrained(model)
    edit(model / "tokenizer_config.json", *([] if stated else [("add_bos_token", "add_eos_token")]))
    bare = tokenizer("你好", add_special_tokens=False)["input_ids"]
    assert tokenizer("你好")["input_ids"][-1] == EOS
    out = quantized(model)
    for reader in (load_tokenizer(model), load_tokenizer(out), AutoTokenizer.from_pretrained(out)):
        assert reader("你好")["input_ids"] == [BOS] * add_bos + bare


@pytest.mark.parametrize("name", ["OwnTokenizer", "LLaMATokenizer", "LlamaTokenizer", "BaichuanTokenizer"])
def test_tokenizer_json_is_loaded_whatever_the_class(tiny_llama, tmp_path, name):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    expected = AutoTokenizer.from_pretrained(model)(TEXTS)["input_ids"]
    edit(model / "tokenizer_config.json", tokenizer_class=name, add_bos_token=False,
         auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    out = quantized(model)
    for reader in (load_tokenizer(model), load_tokenizer(out), AutoTokenizer.from_pretrained(out)):
        assert reader(TEXTS)["input_ids"] == expected


def test_tokenizer_json_alone_takes_eos_from_the_model(tiny_llama, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "tokenizer_config.json").unlink()
    assert load_tokenizer(model).eos_token_id == EOS
    assert AutoTokenizer.from_pretrained(quantized(model)).eos_token_id == EOS


def test_class_that_is_code_without_a_known_file_is_refused(model):
    edit(model / "tokenizer_config.json", tokenizer_class="QWenTokenizer",
         auto_map={"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]})
    (model / "qwen.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(InputError, match=r"code of the model"):
        load_tokenizer(model)


def test_vocabulary_of_an_unknown_class_is_refused(model):
    (model / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4}))
    (model / "merges.txt").write_text("#version: 0.2\na b\n")
    edit(model / "tokenizer_config.json", tokenizer_class="OwnTokenizer", eos_token="</s>")
    with pytest.raises(InputError, match=r"OwnTokenizer"):
        load_tokenizer(model)


@pytest.mark.parametrize("values", [
    {"eos_token": 2}, {"bos_token": ["<s>"]}, {"eos_token": "<|nowhere|>"}, {"chat_template": 1},
    {"chat_template": [{"name": "default"}]}, {"chat_template": {"default": "{{ messages }}"}},
    {"chat_template": ["{{ messages }}"]}, {"added_tokens_decoder": [1]},
])
def test_wrong_values_are_refused_before_the_job(tiny_llama, tmp_path, values):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    edit(model / "tokenizer_config.json", **values)
    with pytest.raises(InputError):
        load_tokenizer(model)
    with pytest.raises(InputError):
        quantize_checkpoint(model, tmp_path / "out", QuantConfig(method="rtn"))
    assert inspect(model).problems
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "content"), [
    ("tokenizer.json", b"{"), ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n"),
    ("added_tokens.json", b"[]"), ("chat_template.jinja", b"{{ messages }}\xff")])
def test_damaged_file_of_a_tokenizer_is_named(tiny_llama, tmp_path, name, content):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / name).write_bytes(content)
    with pytest.raises(InputError, match=naming(model / name)) as caught:
        load_tokenizer(model)
    assert inspect(model).problems == [caught.value.cause]


@pytest.mark.parametrize("content", [b"", b"\x00\x01no model", b"{}"])
def test_damaged_sentencepiece_model_is_refused(model, content):
    (model / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        load_tokenizer(model)


@pytest.mark.parametrize("eos", ["2", "</s>", [2, "3"], True])
def test_eos_that_is_no_token_id_is_refused_by_the_file_that_states_it(tiny_llama, tmp_path, eos):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    edit(model / "generation_config.json", eos_token_id=eos)
    for action in (lambda: load(model, device="cpu"),
                   lambda: quantize_checkpoint(model, tmp_path / "out", QuantConfig(method="rtn"))):
        with pytest.raises(InputError, match=r"generation_config\.json"):
            action()
    assert inspect(model).problems
    assert not (tmp_path / "out").exists()


def test_added_tokens_keep_their_ids(model):
    pieces = train(model / "tokenizer.model")
    (model / "added_tokens.json").write_text(json.dumps({"[PAD]": pieces.get_piece_size()}))
    edit(model / "tokenizer_config.json", pad_token="[PAD]")
    out = quantized(model)
    for reader in (load_tokenizer(model), load_tokenizer(out), AutoTokenizer.from_pretrained(out)):
        assert reader("[PAD]", add_special_tokens=False)["input_ids"] == [pieces.get_piece_size()]


def test_tokenizer_of_a_larger_model_is_refused(tiny_llama, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    edit(model / "config.json", vocab_size=200)
    with pytest.raises(InputError, match="200"):
        load_tokenizer(model)
