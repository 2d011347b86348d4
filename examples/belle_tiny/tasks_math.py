"""Task math: arithmetic with intermediate steps, each a single digit operation, and the answer in a fixed phrase."""

from __future__ import annotations

import random

from .sample import Sample, pick, words

PLACES = ("个位", "十位", "百位", "千位")
PLAIN = (
    "计算{e}",
    "{e}等于多少？",
    "请计算：{e}",
    "{e}=？",
    "请问{e}是多少？",
    "算一算{e}",
    "{e}的结果是多少？",
    "Calculate {e}.",
    "What is {e}?",
    "求{e}的值",
)
THINGS = words("苹果 本子 铅笔 糖果 书 鸡蛋 气球 贴纸 橘子 玩具 硬币 卡片")
KIDS = words("小明 小红 小华 小丽 小刚 小强 小芳 小军 小美 小林")
STORIES = {
    "+": (
        "{k}有{a}个{t}，又买了{b}个，现在一共有多少个{t}？",
        "{k}上午卖出{a}个{t}，下午卖出{b}个，一天卖出多少个？",
        "{k}有{a}个{t}，{j}有{b}个{t}，两人一共有多少个？",
        "箱子里有{a}个{t}，再放进{b}个，箱子里有多少个{t}？",
    ),
    "-": (
        "{k}有{a}个{t}，送给{j}{b}个，还剩多少个？",
        "商店有{a}个{t}，卖出{b}个，还剩多少个{t}？",
        "{k}有{a}元，买{t}花了{b}元，还剩多少元？",
        "{k}有{a}个{t}，{j}有{b}个{t}，{k}比{j}多多少个？",
    ),
    "×": (
        "每盒有{a}个{t}，{b}盒一共有多少个？",
        "一个{t}卖{a}元，{k}买了{b}个，一共花了多少元？",
        "{k}每天做{a}个{t}，{b}天一共做多少个？",
    ),
}


def add_steps(a: int, b: int) -> str:
    """Column addition, units first."""
    steps, carry, place = [], 0, 0
    while a or b:
        x, y = a % 10, b % 10
        total = x + y + carry
        last = a < 10 and b < 10
        terms = f"{x}+{y}" + ("+1" if carry else "")
        write = f"写{total}" if last else f"写{total % 10}" + ("进1" if total > 9 else "")
        steps.append(f"{PLACES[place]}{terms}={total}，{write}")
        a, b, carry, place = a // 10, b // 10, total // 10, place + 1
    return "；".join(steps)


def sub_steps(a: int, b: int) -> str:
    """Column subtraction of b from a (a >= b), units first, with borrowing."""
    steps, borrow, place = [], 0, 0
    while a:
        x, y = a % 10, b % 10
        terms = f"{x}-{y}" + ("-1" if borrow else "")
        value = x - y - borrow
        if value < 0:
            steps.append(f"{PLACES[place]}{terms}不够，借1，1{terms}={value + 10}，写{value + 10}")
        else:
            steps.append(f"{PLACES[place]}{terms}={value}，写{value}")
        a, b, borrow, place = a // 10, b // 10, int(value < 0), place + 1
    return "；".join(steps)


def mul_steps(a: int, b: int) -> str:
    """Column multiplication of a by a one-digit b, units first."""
    steps, carry, place = [], 0, 0
    while a:
        x = a % 10
        product, total = x * b, x * b + carry
        text = f"{PLACES[place]}{x}×{b}={product}" + (f"，{product}+{carry}={total}" if carry else "")
        write = f"写{total}" if a < 10 else f"写{total % 10}" + (f"进{total // 10}" if total > 9 else "")
        steps.append(f"{text}，{write}")
        a, carry, place = a // 10, total // 10, place + 1
    return "；".join(steps)


def operands(rng: random.Random, op: str) -> tuple[int, int]:
    """Two numbers for an operation; sums and differences have two or three digits."""
    if op == "×":
        return rng.randrange(11, 100), rng.randrange(2, 10)
    top = 1000 if rng.random() < 0.4 else 100
    a, b = rng.randrange(10, top), rng.randrange(10, top)
    return (max(a, b), min(a, b)) if op == "-" else (a, b)


def solve(a: int, b: int, op: str) -> str:
    """The answer with its steps."""
    steps = {"+": add_steps, "-": sub_steps, "×": mul_steps}[op](a, b)
    result = {"+": a + b, "-": a - b, "×": a * b}[op]
    return f"{a}{op}{b}：{steps}。答案是{result}"


def math(rng: random.Random) -> Sample:
    """A calculation, as a formula or as a word problem."""
    op = pick(rng, "+-×")
    a, b = operands(rng, op)
    first, second = (a, b) if op == "-" else sorted((a, b))
    key = f"{first}{op}{second}"
    if rng.random() < 0.5:
        question = pick(rng, PLAIN).format(e=f"{a}{op}{b}")
    else:
        k, j = rng.sample(KIDS, 2)
        question = pick(rng, STORIES[op]).format(a=a, b=b, k=k, j=j, t=pick(rng, THINGS))
    return Sample("math", question, solve(a, b, op), key)
