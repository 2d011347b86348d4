"""Tasks closed_qa and summarization, whose answers are copied from a passage."""

from __future__ import annotations

import random
from collections.abc import Callable

from . import vocabulary as v
from .sample import Sample, pick, wrap

Attributes = dict[str, tuple[str, str, Callable[[random.Random], str]]]
World = tuple[str, list[tuple[str, str]]]

# attribute: (statement, question, value); the answer is the statement about the subject of the question
ABOUT_PEOPLE: Attributes = {
    "city": ("住在{x}", "住在哪里？", lambda r: pick(r, v.CITIES)),
    "age": ("今年{x}岁", "今年多少岁？", lambda r: str(r.randrange(11, 80))),
    "job": ("的职业是{x}", "的职业是什么？", lambda r: pick(r, v.JOBS)),
    "hobby": ("喜欢{x}", "喜欢什么？", lambda r: pick(r, v.HOBBIES)),
    "colour": ("穿着{x}的衣服", "穿着什么颜色的衣服？", lambda r: pick(r, v.COLOURS)),
    "year": ("出生于{x}年", "出生于哪一年？", lambda r: str(r.randrange(1940, 2015))),
}
ABOUT_COMPANIES: Attributes = {
    "year": ("成立于{x}年", "成立于哪一年？", lambda r: str(r.randrange(1950, 2024))),
    "city": ("总部位于{x}", "总部位于哪里？", lambda r: pick(r, v.CITIES)),
    "staff": ("有{x}名员工", "有多少名员工？", lambda r: str(r.randrange(20, 3000))),
    "boss": ("的经理是{x}", "的经理是谁？", v.person),
}
CLOSED = (
    "根据短文回答问题。\n短文：{t}\n问题：{q}",
    "阅读下面的内容，回答问题：{q}\n{t}",
    "{t}\n{q}",
    "{t}请问，{q}",
    "已知：{t}请回答：{q}",
    "阅读材料：{t}\n根据材料回答：{q}",
)


def describe(rng: random.Random, names: list[str], table: Attributes) -> World:
    """A passage that states the same attributes of each name, and the questions that it answers."""
    asked = rng.sample(list(table), 2 if len(names) > 1 else 3)
    sentences, pairs = [], []
    for name in names:
        parts = []
        for position, (statement, question, value) in enumerate(table[a] for a in asked):
            fact = statement.format(x=value(rng))
            parts.append(name + fact if position == 0 or fact.startswith("的") else fact)
            pairs.append((name + question, name + fact + "。"))
        sentences.append("，".join(parts) + "。")
    return "".join(sentences), pairs


def prices(rng: random.Random) -> World:
    """A price list."""
    goods = v.draw(rng, v.FRUITS, rng.randrange(3, 6))
    facts = [(g, f"{g}每斤{p}元") for g, p in zip(goods, rng.sample(range(2, 40), len(goods)), strict=True)]
    return "，".join(f for _, f in facts) + "。", [(f"{g}每斤多少元？", f + "。") for g, f in facts]


def timetable(rng: random.Random) -> World:
    """A teacher's week."""
    days = ["周一", "周二", "周三", "周四", "周五"][: rng.randrange(3, 6)]
    facts = [(d, f"{d}上{s}课") for d, s in zip(days, v.draw(rng, v.SUBJECTS, len(days)), strict=True)]
    passage = f"{pick(rng, v.SURNAMES)}老师的课表：" + "，".join(f for _, f in facts) + "。"
    return passage, [(f"{d}上什么课？", f + "。") for d, f in facts]


def world(rng: random.Random) -> World:
    """A passage about people, companies, prices or a timetable, with questions and answers."""
    kind = rng.random()
    if kind < 0.4:
        return describe(rng, v.people(rng, pick(rng, (1, 2, 2, 3))), ABOUT_PEOPLE)
    if kind < 0.65:
        first, second = v.company(rng), v.company(rng)
        return describe(
            rng, [first, second] if first[:2] != second[:2] and rng.random() < 0.5 else [first], ABOUT_COMPANIES
        )
    return prices(rng) if kind < 0.85 else timetable(rng)


def closed_qa(rng: random.Random) -> Sample:
    """A question about a passage; the answer is a sentence of the passage with its subject."""
    passage, pairs = world(rng)
    asked = rng.sample(pairs, 2)
    question = pick(rng, CLOSED).format(t=passage, q=asked[0][0])
    return Sample("closed_qa", question, asked[0][1], passage, asked[1])


SUMMARY = (
    "请用一句话概括下面的内容",
    "总结下文",
    "请写出这段话的摘要",
    "概括这段文字的主要内容",
    "请为下面的新闻写一个简短的摘要",
)


def summarization(rng: random.Random) -> Sample:
    """A short notice and its summary in one sentence."""
    c, d, n, q = pick(rng, v.CITIES), v.date(rng), v.person(rng), str(rng.randrange(20, 5000))
    e, p, k = pick(rng, v.EVENTS), pick(rng, v.PRODUCTS), v.company(rng)
    text, summary = pick(
        rng,
        (
            (
                "{d}，{c}举办了{e}。现场气氛热烈，共有{q}人参加。组织者{n}说，明年还会继续举办。",
                "{c}举办{e}，{q}人参加。",
            ),
            ("{k}在{d}发布了新款{p}。经理{n}介绍说，新产品价格为{q}元，质量更好。", "{k}发布新款{p}，价格{q}元。"),
            ("近日，{n}从{c}来到本地，参加{d}开始的{e}。他表示非常期待，也希望认识更多朋友。", "{n}将参加{d}的{e}。"),
            (
                "由于大雨，{c}的{e}改到{d}进行。已经报名的{q}人将收到通知。负责人{n}表示歉意。",
                "因大雨，{c}的{e}改到{d}。",
            ),
            ("{k}计划在{c}招聘{q}名员工。报名从{d}开始，联系人是{n}。公司提供住房和午餐。", "{k}在{c}招聘{q}名员工。"),
        ),
    )
    names = {"c": c, "d": d, "n": n, "q": q, "e": e, "p": p, "k": k}
    text = text.format(**names)
    return Sample("summarization", wrap(rng, SUMMARY, text), summary.format(**names), text)
