"""Tasks open_qa, brainstorming and code, which need knowledge or a template."""

from __future__ import annotations

import random

from .facts import ENGLISH_CAPITALS, FACTS, IDEAS
from .sample import Sample, pick

ASKING = ("", "", "请问，", "你知道吗，", "请回答：", "问题：", "我想知道，", "考考你，", "简单回答：", "帮我查一下，")
ENGLISH = (
    "What is the capital of {s}?",
    "Tell me the capital of {s}.",
    "Which city is the capital of {s}?",
    "Name the capital of {s}.",
)


def open_qa(rng: random.Random) -> Sample:
    """A fact in one of its wordings; all splits have the same facts, but different prompts."""
    if rng.random() < 0.12:
        index = 2 * rng.randrange(len(ENGLISH_CAPITALS) // 2)
        country, city = ENGLISH_CAPITALS[index : index + 2]
        question = pick(rng, ENGLISH).format(s=country)
        return Sample("open_qa", question, f"The capital of {country} is {city}.", question)
    wordings, answer, table = FACTS[pick(rng, list(FACTS) + ["capital"])]
    words = table.split()
    index = 2 * rng.randrange(len(words) // 2)
    question = pick(rng, ASKING) + pick(rng, wordings).format(s=words[index])
    return Sample("open_qa", question, answer.format(s=words[index], v=words[index + 1]), question)


LISTING = (
    "列出{n}个{t}",
    "请给出{n}个{t}",
    "说说{n}个{t}",
    "请列举{n}个{t}",
    "帮我想{n}个{t}",
    "写出{n}个{t}",
    "我需要{n}个{t}",
    "{t}有哪些？说出{n}个",
)
NUMERALS = {"三": 3, "四": 4, "五": 5, "六": 6, "3": 3, "4": 4, "5": 5, "6": 6}


def brainstorming(rng: random.Random) -> Sample:
    """A numbered list of the first n ideas of a topic."""
    topic, count = pick(rng, list(IDEAS)), pick(rng, list(NUMERALS))
    ideas = IDEAS[topic].split()[: NUMERALS[count]]
    question = pick(rng, LISTING).format(n=count, t=topic) + pick(rng, ("。", "，谢谢。", "吧。", "，要简单。"))
    return Sample("brainstorming", question, "\n".join(f"{i}. {idea}" for i, idea in enumerate(ideas, 1)), question)


# Chinese, English, function names, parameter kind, body
PROGRAMS = (
    ("返回{x}加{n}的结果", "returns {x} plus {n}", "add", "{x} + {n}"),
    ("返回{x}减{n}的结果", "returns {x} minus {n}", "minus", "{x} - {n}"),
    ("返回{x}乘以{n}的结果", "returns {x} times {n}", "times", "{x} * {n}"),
    ("判断{x}是否大于{n}", "checks whether {x} is greater than {n}", "greater", "{x} > {n}"),
    ("判断{x}是否小于{n}", "checks whether {x} is less than {n}", "less", "{x} < {n}"),
    ("判断{x}能否被{n}整除", "checks whether {x} is divisible by {n}", "divides", "{x} % {n} == 0"),
    ("返回列表{x}的前{n}个元素", "returns the first {n} items of {x}", "head", "{x}[:{n}]"),
    ("返回列表{x}的最后{n}个元素", "returns the last {n} items of {x}", "tail", "{x}[-{n}:]"),
    ("返回列表{x}的和再加{n}", "returns the sum of {x} plus {n}", "total", "sum({x}) + {n}"),
    ("返回列表{x}的最大值减{n}", "returns the maximum of {x} minus {n}", "largest", "max({x}) - {n}"),
    ("把字符串{x}重复{n}次", "repeats the string {x} {n} times", "repeat", "{x} * {n}"),
    ("返回{x}的{n}次方", "returns {x} to the power of {n}", "power", "{x} ** {n}"),
)
PARAMETERS = ("x", "a", "value", "data", "items", "number", "text", "n")
NAMES = ("my", "get", "do", "run", "new", "the", "find", "make")


def code(rng: random.Random) -> Sample:
    """A one-line Python function."""
    chinese, english, stem, body = pick(rng, PROGRAMS)
    x, n = pick(rng, PARAMETERS), str(rng.randrange(2, 100))
    name = f"{pick(rng, NAMES)}_{stem}"
    if rng.random() < 0.75:
        form = pick(
            rng,
            (
                "写一个Python函数{f}，{t}",
                "用Python编写函数{f}，{t}",
                "请实现Python函数{f}：{t}",
                "请写出函数{f}的Python代码，要求{t}",
            ),
        )
        question = form.format(f=name, t=chinese.format(x=x, n=n)) + "。"
    else:
        question = f"Write a Python function {name} that {english.format(x=x, n=n)}."
    return Sample("code", question, f"def {name}({x}):\n    return {body.format(x=x, n=n)}", f"{name} {x} {body} {n}")
