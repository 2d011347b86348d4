"""Task translation: Chinese and English sentences from templates."""

from __future__ import annotations

import random

from .lexicon import ADJECTIVES, ANIMALS, COUNTS, FOOD, GOALS, GOODS, PLACES, STATES, SUBJECTS, TIMES, VERBS
from .sample import Sample, pick, wrap

TO_ENGLISH = (
    "把下面的句子翻译成英文",
    "翻译成英语",
    "请将这句话翻译成英文",
    "将下列中文译成英文",
    "用英语怎么说",
    "Translate into English",
)
TO_CHINESE = (
    "把下面的句子翻译成中文",
    "翻译成中文",
    "请将这句话翻译成中文",
    "将下列英文译成中文",
    "用中文怎么说",
    "Translate into Chinese",
)

Pair = tuple[str, str]


def thing(rng: random.Random, nouns: tuple[tuple[str, str, str, str], ...]) -> Pair:
    """A noun with a number and optionally an adjective: 两本红色的书, two red books."""
    measure, chinese, one, many = pick(rng, nouns)
    count, english_count = pick(rng, COUNTS)
    adjective, english_adjective = pick(rng, ADJECTIVES)
    words = f"{english_adjective} {one if count == '一' else many}".strip()
    if count == "一" and words[0] in "aeiou":
        english_count = "an"
    return f"{count}{measure}{adjective}{chinese}", f"{english_count} {words}"


def action(rng: random.Random) -> Pair:
    """Subject, time, place, verb and object."""
    subject, english_subject, third = pick(rng, SUBJECTS)
    time, english_time, tense = pick(rng, TIMES)
    place, english_place = pick(rng, PLACES)
    verb, base, present, past, nouns = pick(rng, VERBS)
    noun, english_noun = thing(rng, nouns)
    english_verb = {"past": past, "now": present if third else base, "will": f"will {base}"}[tense]
    chinese = (
        subject + time + ("会" if tense == "will" else "") + place + verb + ("了" if tense == "past" else "") + noun
    )
    english = " ".join(w for w in (english_subject, english_verb, english_noun, english_place, english_time) if w)
    return chinese + "。", english + "."


def wish(rng: random.Random) -> Pair:
    """Somebody wants, likes, needs or is able to do something; affirmative or negative."""
    subject, english_subject, third = pick(rng, SUBJECTS)
    goal, english_goal = pick(rng, GOALS)
    place, english_place = pick(rng, PLACES)
    no = rng.random() < 0.3
    s, does = ("s", "doesn't") if third else ("", "don't")
    verb, english_verb = pick(
        rng, (("想", "want{s} to"), ("喜欢", "like{s} to"), ("需要", "need{s} to"), ("能", "can"))
    )
    if verb == "能":
        english_verb = "can't" if no else "can"
    else:
        english_verb = f"{does} {english_verb.format(s='')}" if no else english_verb.format(s=s)
    english = " ".join(w for w in (english_subject, english_verb, english_goal, english_place) if w)
    return f"{subject}{'不' if no else ''}{verb}{place}{goal}。", english + "."


def state(rng: random.Random) -> Pair:
    """State of somebody now or in the past, sometimes as a question."""
    subject, english_subject, third = pick(rng, SUBJECTS)
    adjective, english_adjective = pick(rng, STATES)
    past = rng.random() < 0.4
    time, english_time = (
        pick(rng, (("昨天", " yesterday"), ("上周", " last week")))
        if past
        else pick(rng, (("今天", " today"), ("现在", " now")))
    )
    be = {True: "was" if third else "were", False: "is" if third else "are"}[past]
    if english_subject == "I":
        be = "was" if past else "am"
    if rng.random() < 0.3:
        return f"{subject}{time}{adjective}吗？", f"{be} {english_subject} {english_adjective}{english_time}?"
    return f"{subject}{time}{adjective}。", f"{english_subject} {be} {english_adjective}{english_time}."


def existence(rng: random.Random) -> Pair:
    """Something exists at a place."""
    place, english_place = pick(rng, PLACES[:-3])
    first = thing(rng, pick(rng, (GOODS, ANIMALS, FOOD)))
    be = "is" if first[1].startswith(("a ", "an ")) else "are"
    return f"{place.removeprefix('在')}有{first[0]}。", f"there {be} {first[1]} {english_place}."


def translation(rng: random.Random) -> Sample:
    """A sentence and its translation; both directions have the same split."""
    chinese, english = pick(rng, (action, action, wish, state, existence))(rng)
    english = english[0].upper() + english[1:]
    if rng.random() < 0.5:
        return Sample("translation", wrap(rng, TO_ENGLISH, chinese), english, english)
    return Sample("translation", wrap(rng, TO_CHINESE, english), chinese, english)
