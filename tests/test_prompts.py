"""Prompt styles and chat templates; streamed text has complete characters and no stop strings for any chunking."""

import pytest
from conftest import SENTENCES, naming, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_belle.errors import InputError, UsageError
from gptq_belle.models.architectures import FAMILIES
from gptq_belle.prompts.messages import turns_from_messages
from gptq_belle.prompts.stop_strings import IncrementalDecoder, StopStrings, TextStream
from gptq_belle.prompts.styles import (
    STYLES,
    Turn,
    chat_template,
    detect_style,
    get_style,
    render_conversation,
)

few = settings(max_examples=100, deadline=None)
TOKENIZER = tiny_tokenizer()


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# ---- prompts ----


@pytest.mark.parametrize(("style", "text"), [
    ("bloom", "Human: 你好\n\nAssistant:"),
    ("llama", "Human: 你好 \n\nAssistant: "),
    ("newline", "Human: \n你好\n\nAssistant: \n"),
])
def test_single_question_is_rendered(style, text):
    assert render_conversation([Turn("你好")], style, "</s>") == text


def test_answers_end_with_eos():
    turns = [Turn("a", "b"), Turn("c", "d"), Turn("e")]
    assert render_conversation(turns, "bloom", "</s>") == (
        "Human: a\n\nAssistant:b</s>Human: c\n\nAssistant:d</s>Human: e\n\nAssistant:")


def test_unknown_style_is_refused():
    with pytest.raises(UsageError, match=naming("alpaca")) as caught:
        render_conversation([], "alpaca", "")
    assert all(style in caught.value.remedy for style in STYLES)


def test_every_architecture_has_a_known_style():
    assert {row.prompt_style for row in FAMILIES.values()} <= STYLES.keys()
    assert not get_style("newline").special_tokens


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "It's 'so'\n \\n {{ x }}"},
    {"role": "assistant", "content": " ok\n"},
    {"role": "user", "content": "你好"},
]


@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:], MESSAGES[:3], MESSAGES[3:]])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_chat_template_equals_render_conversation(style, bos, messages):
    theirs = TOKENIZER.apply_chat_template(messages, chat_template=chat_template(style, bos=bos), tokenize=False,
                                           add_generation_prompt=True)
    prefix = "<s>" if bos and style != "newline" else ""
    assert theirs == prefix + render_conversation(turns_from_messages(messages), style, "</s>")


def test_messages_become_turns():
    assert turns_from_messages(MESSAGES) == [Turn(MESSAGES[1]["content"], " ok\n", "Be brief."), Turn("你好")]


@pytest.mark.parametrize("messages", [
    [{"role": "assistant", "content": "a"}],
    [{"role": "user", "content": "q"}, {"role": "system", "content": "s"}],
    [{"role": "tool", "content": "t"}],
    [{"content": "t"}],
])
def test_messages_out_of_order_are_refused(messages):
    with pytest.raises(UsageError):
        turns_from_messages(messages)


def test_style_detection():
    assert detect_style({"model_type": "bloom"}) == "bloom"
    assert detect_style({"model_type": "llama"}) == "llama"
    assert detect_style({"model_type": "llama"}, "{{ somebody else's }}") == "template"
    for style in STYLES:
        assert detect_style({"model_type": "llama"}, chat_template(style)) == style
        assert detect_style({"model_type": "bloom", "prompt_style": style}, chat_template("llama")) == style
    assert detect_style({"model_type": "bloom"}, chat_template("llama", bos=True)) == "llama"
    with pytest.raises(InputError, match=naming("prompt_style", "'x'")):
        detect_style({"model_type": "bloom", "prompt_style": "x"})


# ---- whole characters ----


def pieces_of(data, items):
    """Split a list into chunks, some of which are empty."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(items)), max_size=6)))
    return [items[a:b] for a, b in zip([0, *cuts], [*cuts, len(items)], strict=True)]


@few
@given(st.lists(st.integers(4, len(TOKENIZER) - 1), max_size=30), st.data())
def test_detokenization_does_not_depend_on_chunks(ids, data):
    whole = IncrementalDecoder(decode)
    text = "".join(whole.feed(piece) for piece in pieces_of(data, ids)) + whole.finish()
    assert text == decode(ids)


@few
@given(st.text(max_size=20) | st.sampled_from(SENTENCES), st.data())
def test_characters_are_never_split(text, data):
    if "\ufffd" in text:
        return
    whole = IncrementalDecoder(decode)
    shown = [whole.feed(piece) for piece in pieces_of(data, TOKENIZER.encode(text))]
    assert not any("\ufffd" in piece for piece in shown)
    assert "".join(shown) == text
    assert whole.finish() == ""


def test_split_character_is_shown_with_its_last_byte():
    ids = TOKENIZER.encode("龘")  # in no training sentence, so three tokens of one byte
    assert len(ids) == 3
    whole = IncrementalDecoder(decode)
    assert [whole.feed([i]) for i in ids] == ["", "", "龘"]


def test_incomplete_utf8_is_emitted_at_the_end():
    whole = IncrementalDecoder(decode)
    assert whole.feed(TOKENIZER.encode("好")) == "好"
    assert whole.feed(TOKENIZER.encode("龘")[:2]) == ""
    assert whole.finish() == "\ufffd"
    assert whole.finish() == ""


def test_leading_space_of_a_token_is_kept_inside_the_text():
    words = {1: "Hello", 2: " world", 3: "!"}  # as LLaMA's tokenizer: a space at the beginning is dropped
    whole = IncrementalDecoder(lambda ids: "".join(words[i] for i in ids).removeprefix(" "))
    assert [whole.feed([i]) for i in (2, 1, 2, 3)] == ["world", "Hello", " world", "!"]


# ---- stop strings ----


def cut(text, stops):
    """Expected text: up to the stop string that is complete first, and the longest of several."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@few
@given(st.text("aHum:\n", max_size=30), st.lists(st.text("aHum:\n", max_size=4), max_size=3), st.data())
def test_stop_position_does_not_depend_on_chunks(text, stops, data):
    filtered, expected, shown = StopStrings(stops), cut(text, stops), ""
    for piece in pieces_of(data, text):
        shown += filtered.feed(piece)
        assert expected.startswith(shown)  # so no character of a stop string was ever out
    shown += filtered.finish()
    assert shown == expected
    assert filtered.stopped == (expected != text or any(stop and stop in text for stop in stops))


@few
@given(st.sampled_from(["北京", "Hum", "春天 Human", "ok\n\n", ""]),
       st.sampled_from(["Human: 你", "\n\nHuman: x", "好"]), st.data())
def test_no_part_of_a_stop_string_is_shown(answer, more, data):
    stream, shown = TextStream(decode, STYLES["bloom"].stops), ""
    expected = cut(answer + more, STYLES["bloom"].stops)
    for piece in pieces_of(data, TOKENIZER.encode(answer + more)):
        shown += stream.feed(piece)
        assert expected.startswith(shown)
    assert shown + stream.finish() == expected
    assert stream.stopped == ("Human:" in answer + more)


def test_no_text_is_returned_after_a_stop_string():
    filtered = StopStrings(["Human:"])
    assert filtered.feed("a Human: b") == "a "
    assert filtered.stopped
    assert filtered.feed("c") == ""
    assert filtered.finish() == ""


def test_without_stop_strings_nothing_is_held_back():
    filtered = StopStrings(["", *()])
    assert filtered.feed("Human:") == "Human:"
    assert not filtered.stopped


def test_invalid_bytes_are_shown_without_accumulating():
    windows = []

    def decode(ids):
        windows.append(len(ids))
        return bytes(ids).decode("utf-8", "replace")

    text = IncrementalDecoder(decode)
    assert len("".join(text.feed([0xE4]) for _ in range(200))) > 150
    assert max(windows) < 80
