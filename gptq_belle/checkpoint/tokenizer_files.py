"""Load the tokenizer of a model directory, and copy its files to an output.

The ids are those of the tokenizer that the model was trained with: of tokenizer.json, else of SentencePiece's
tokenizer.model. Neither depends on the name of the tokenizer class, which old and new releases of transformers map to
different conversions, and no code of the directory is run.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gptq_belle.checkpoint.config_files import GENERATION, repaired_generation_config
from gptq_belle.checkpoint.reader import read_json
from gptq_belle.checkpoint.sentencepiece_model import convert_sentencepiece
from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.common.files import reject_lfs_pointer
from gptq_belle.errors import GptqBelleError, InputError, one_line
from gptq_belle.models.decoder_config import token_ids
from gptq_belle.prompts.styles import chat_template, detect_style

CONFIG, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "config.json", "tokenizer_config.json", "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE, NAMED_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENIZER, SENTENCEPIECE, VOCABULARY, MERGES = "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"
FAST_CLASS = "PreTrainedTokenizerFast"  # the name in transformers 4; 5 accepts it, too
EXACT, INEXACT_JSON = "cut_by_sentencepiece", "inexact_json"  # our key of tokenizer_config.json; an attribute
NO_TOKENIZER = ("Copy tokenizer.json and tokenizer_config.json of the model into the folder; convert also takes "
                "their folder as --base DIR.")
DAMAGED = "Fetch the tokenizer's files again."
SAVE_AS_JSON = ("Load it with transformers and trust_remote_code=True, and save it with save_pretrained, so that the "
                "folder has a tokenizer.json.")
COPIED_FILES = (TOKENIZER, SENTENCEPIECE, VOCABULARY, MERGES, SPECIAL_TOKENS_MAP, ADDED_TOKENS, GENERATION,
                TEMPLATE)
SPECIAL_TOKENS = ("unk_token", "bos_token", "eos_token", "pad_token")
# Keys that name code or other files to load.
IGNORED_KEYS = ("auto_map", "fast_tokenizer_files", "tokenizer_file", "vocab_file", "special_tokens_map_file")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory; nothing is downloaded, and no code of the directory is run.

    It adds bos where the model was trained with it, and never eos: text is a prompt that the model continues.

    Raises:
        InputError: the tokenizer is missing or damaged, has no eos token or one outside of the model's vocabulary, or
            can be loaded only by code of the directory.
    """
    for name in (TOKENIZER, SENTENCEPIECE, VOCABULARY, TOKENIZER_CONFIG):
        reject_lfs_pointer(path / name)
    stated = _stated_config(path)
    try:
        with TemporaryDirectory(prefix="gptq-belle-") as folder:
            tokenizer, exact = _load(path, Path(folder), stated)
        tokenizer.name_or_path = str(path)
        config = _read_optional(path / CONFIG)
        _set_eos(tokenizer, path, config)
        _check_vocabulary(tokenizer, path, config.get("vocab_size"))
        _set_added_tokens(tokenizer, path, stated)
        if exact is not None:
            setattr(tokenizer, INEXACT_JSON, tokenizer.backend_tokenizer.to_str())
            tokenizer.backend_tokenizer.pre_tokenizer = exact
    except (KeyboardInterrupt, SystemExit, GptqBelleError):
        raise
    except BaseException as error:  # for damaged files the tokenizers library raises bare Exceptions, or panics
        _refuse_damaged_file(path)
        reason = one_line(error).replace(folder, str(path))
        raise InputError(f"the tokenizer of {path} cannot be loaded: {reason}", NO_TOKENIZER) from error
    return tokenizer


def _refuse_damaged_file(path: Path) -> None:
    """Raise InputError for a file of a tokenizer that is not JSON or not text: errors of libraries do not name it."""
    for name in (TOKENIZER, ADDED_TOKENS, VOCABULARY):
        _read_optional(path / name)
    for file in (path / MERGES, path / TEMPLATE, *(path / NAMED_TEMPLATES).glob("*.jinja")):
        try:
            if file.is_file():
                file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text (byte {error.start})", DAMAGED) from error


def _load(path: Path, folder: Path, stated: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, Any]:
    """Load the tokenizer through `folder`, which gets its files with corrected settings.

    Returns:
        The tokenizer, and `SentencePieceTokenizer.exact`.
    """
    config, exact = dict(stated), None
    linked = [ADDED_TOKENS, TEMPLATE, NAMED_TEMPLATES]
    if (path / TOKENIZER).is_file() and not (stated.get(EXACT) and (path / SENTENCEPIECE).is_file()):
        linked.append(TOKENIZER)
    elif (path / SENTENCEPIECE).is_file():
        converted = convert_sentencepiece(path / SENTENCEPIECE, legacy=config.get("legacy") is not False,
                                          add_prefix_space=config.get("add_prefix_space") is not False)
        (folder / TOKENIZER).write_text(converted.tokenizer.to_str(), encoding="utf-8")
        config, exact = converted.special_tokens | config, converted.exact
    elif (path / VOCABULARY).is_file():
        linked += [VOCABULARY, MERGES, CONFIG]
    elif "auto_map" in _read_optional(path / TOKENIZER_CONFIG):
        raise InputError(f"the tokenizer of {path} is code of the model, which is not run", SAVE_AS_JSON)
    else:
        raise InputError(f"{path} contains no tokenizer", NO_TOKENIZER)
    for name in linked:
        if (path / name).exists():
            (folder / name).symlink_to((path / name).resolve())
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    if VOCABULARY not in linked:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True), exact
    return _load_by_class(path, folder, stated.get("tokenizer_class")), exact


def _load_by_class(path: Path, folder: Path, name: Any) -> PreTrainedTokenizerBase:
    """Load a vocab.json: how text is split before BPE is known only to the tokenizer class of transformers.

    Raises:
        InputError: transformers has no such class.
    """
    unknown = InputError(f"{path} has no {TOKENIZER}, and its tokenizer class {name} cannot read {VOCABULARY}",
                         SAVE_AS_JSON)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ValueError as error:
        raise unknown from error
    if type(tokenizer) is PreTrainedTokenizerFast:
        raise unknown
    return tokenizer


def _stated_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens of special_tokens_map.json, without those that are empty.

    Conversions of early 2023, such as BELLE-LLaMA, have empty strings, which cause a RecursionError in transformers 5.

    Raises:
        InputError: a file is not a JSON object, or a special token or the chat template is of a wrong type.
    """
    path = folder / TOKENIZER_CONFIG
    config = {key: value for key, value in _read_optional(path).items() if key not in IGNORED_KEYS}
    more = _read_optional(folder / SPECIAL_TOKENS_MAP)
    for key in SPECIAL_TOKENS:
        content = _content(config.get(key), key, path)
        if content == "":
            del config[key]
        if not content and (named := _content(more.get(key), key, folder / SPECIAL_TOKENS_MAP)):
            config[key] = named
    _check_template(config.get("chat_template"), path)
    return config


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any, key: str, path: Path) -> str | None:
    """Text of a special token, which is a string or the fields of an AddedToken."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise InputError(f"{key} of {path} is {json.dumps(token)[:80]}, not a token", f"State the text of {key}.")
    return content


def _check_template(template: Any, path: Path) -> None:
    """Accept a template, or a list of ``{"name": ..., "template": ...}``."""
    named = template if isinstance(template, list) else []
    if not (template is None or isinstance(template, str | list)) or not all(
            isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
            for one in named):
        raise InputError(f"chat_template of {path} is neither a template nor a list of templates with names",
                         "Correct it, or remove it to use BELLE's prompts.")


def _set_eos(tokenizer: PreTrainedTokenizerBase, path: Path, config: dict[str, Any]) -> None:
    """Take an eos token that the tokenizer does not state from config.json.

    Raises:
        InputError: there is no eos token.
    """
    if tokenizer.eos_token is not None:
        return
    ids = [token for token in sorted(token_ids(config, "eos_token_id")) if 0 <= token < len(tokenizer)]
    names = [token for token in tokenizer.convert_ids_to_tokens(ids) if token is not None]
    if "<s>" in names and "</s>" in tokenizer.get_vocab():  # LLaMA's first conversions state wrong ids
        names = ["</s>"]
    if not names:
        raise InputError(f"{path}: the tokenizer has no eos token", f"State eos_token in {TOKENIZER_CONFIG}.")
    tokenizer.eos_token = names[0]


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, path: Path, size: Any) -> None:
    """Refuse a tokenizer of another model. An added token such as [PAD] may be outside of the model's vocabulary.

    Raises:
        InputError: a token or eos is not among the `size` tokens of the model.
    """
    if not isinstance(size, int):
        return
    if tokenizer.vocab_size > size:
        raise InputError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {size}",
                         "Copy the tokenizer's files of this model into the folder.")
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id >= size:
        raise InputError(f"{path}: the eos token {tokenizer.eos_token!r} is not among the {size} tokens of the model",
                         f"Correct eos_token in {TOKENIZER_CONFIG}.")


def _set_added_tokens(tokenizer: PreTrainedTokenizerBase, path: Path, stated: dict[str, Any]) -> None:
    """Let the tokenizer add bos as in training, and no eos.

    LLaMA's class follows ``add_bos_token``, which is true by default, whatever tokenizer.json says; other classes
    follow tokenizer.json.
    """
    ids = tokenizer("a")["input_ids"]
    begins, ends = (ids[:1] == [tokenizer.bos_token_id]), ids[-1:] == [tokenizer.eos_token_id]
    bos = begins
    if "llama" in str(stated.get("tokenizer_class")).lower() or stated.get(EXACT) or not (path / TOKENIZER).is_file():
        default = begins if (path / VOCABULARY).is_file() else True
        bos = tokenizer.bos_token is not None and bool(stated.get("add_bos_token", default))
    if ends or bos != begins:
        tokenizer.add_bos_token, tokenizer.add_eos_token = bos, False


def copy_tokenizer(writer: CheckpointWriter, folder: Path, tokenizer: PreTrainedTokenizerBase,
                   config: dict[str, Any]) -> None:
    """Copy the files of the tokenizer and generation_config.json from `folder`, and add a chat template.

    transformers reads the same ids from the copy as `load_tokenizer`. An existing template is kept unless the
    ``prompt_style`` of `config` selects another one.
    """
    named = isinstance(tokenizer.chat_template, dict)
    for file in copied_files(folder):
        if file.name == GENERATION:
            writer.write_json(GENERATION, repaired_generation_config(read_json(file), file))
        elif file.name == SPECIAL_TOKENS_MAP and "" in (tokens := read_json(file)).values():
            writer.write_json(SPECIAL_TOKENS_MAP, {key: token for key, token in tokens.items() if token != ""})
        elif file.parent == folder and not (file.name == TEMPLATE and ("prompt_style" in config or named)):
            (writer.files / file.name).write_bytes(file.read_bytes())
    if not _reads_alike(folder / TOKENIZER, tokenizer):
        text = getattr(tokenizer, INEXACT_JSON, None) or tokenizer.backend_tokenizer.to_str()
        writer.write_text(TOKENIZER, text)  # readers then do not need sentencepiece
    writer.write_json(TOKENIZER_CONFIG, _tokenizer_config(folder, tokenizer, config))


def _reads_alike(file: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer.json adds the same special tokens to a text, or the tokenizer cannot be written as one."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return True
    return file.is_file() and Tokenizer.from_file(str(file)).encode("a").ids == tokenizer("a")["input_ids"]


def needs_sentencepiece(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether SentencePiece itself has to cut the text: any tokenizer.json gives other ids for some texts."""
    return hasattr(tokenizer, INEXACT_JSON)


def copied_files(folder: Path) -> list[Path]:
    """The files of a model directory whose content `copy_tokenizer` writes to the output.

    Raises:
        InputError: one is a link to a file of another name outside of the folder and of the hub's cache. Its content
            might not be meant for publication.
    """
    place = folder.resolve()
    cache = [place.parent.parent / "blobs"] if place.parent.name == "snapshots" else []
    found = [folder / name for name in COPIED_FILES if (folder / name).is_file()]
    found += sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))
    for file in found:
        target = file.resolve()
        if target.name != file.name and not any(target.is_relative_to(own) for own in (place, *cache)):
            raise InputError(f"{file} links to {target}", "Put the file itself into the folder.")
    return found


def _tokenizer_config(folder: Path, tokenizer: PreTrainedTokenizerBase, model: dict[str, Any]) -> dict[str, Any]:
    config = _stated_config(folder)
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        config["tokenizer_class"] = FAST_CLASS  # reads tokenizer.json without changes in transformers 4 and 5
    if needs_sentencepiece(tokenizer):
        config[EXACT] = True
    config |= {key: token for key in SPECIAL_TOKENS[:3]
               if config.get(key) is None and (token := getattr(tokenizer, key)) is not None}
    if config.get("add_eos_token") or needs_sentencepiece(tokenizer) or not (folder / TOKENIZER).is_file():
        config |= {"add_bos_token": bool(tokenizer.add_bos_token), "add_eos_token": False}
    if isinstance(tokenizer.chat_template, dict):
        config["chat_template"] = [{"name": name, "template": text} for name, text in tokenizer.chat_template.items()]
    if "prompt_style" in model or not tokenizer.chat_template:
        adds_bos = bool(tokenizer("")["input_ids"])  # the result of a template is tokenized without special tokens
        config["chat_template"] = chat_template(detect_style(model), bos=adds_bos)
    return config
