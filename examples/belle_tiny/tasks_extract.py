"""Task extract: copy names, numbers, dates and places from generated notices."""

from __future__ import annotations

import random
from collections.abc import Callable

from . import vocabulary as v
from .sample import Sample, pick, wrap

Record = tuple[str, dict[str, str]]

FILLERS = (
    "请大家相互转告。",
    "天气预报说当天有小雨。",
    "有问题请及时反馈。",
    "感谢大家的支持。",
    "欢迎各位参加。",
    "",
    "",
    "",
    "",
)
EXTRACT = (
    "从下面的文字中提取{f}",
    "找出下文中的{f}",
    "请提取文中的{f}",
    "请找出这段话里的{f}",
    "提取下列文本中的{f}",
    "下面这段话中的{f}是什么？请提取",
)


def contact(rng: random.Random) -> Record:
    """Contact data of a person."""
    n, p, c = v.person(rng), v.phone(rng), pick(rng, v.CITIES)
    text = pick(
        rng,
        (
            "{n}住在{c}，电话是{p}。",
            "联系人{n}，电话{p}，地址在{c}。",
            "请拨打{p}联系{c}的{n}。",
            "{c}分店的负责人是{n}，手机号是{p}。",
        ),
    )
    return text.format(n=n, p=p, c=c), {"人名": n, "电话号码": p, "地名": c}


def meeting(rng: random.Random) -> Record:
    """Time and place of a meeting."""
    n, d, t, r = v.person(rng), v.date(rng), v.clock(rng), pick(rng, v.ROOMS)
    text = pick(
        rng, ("会议定于{d}{t}在{r}举行，主持人是{n}。", "{n}通知大家，{d}{t}到{r}开会。", "{d}{t}，{n}将在{r}作报告。")
    )
    return text.format(n=n, d=d, t=t, r=r), {"人名": n, "日期": d, "时间": t, "地点": r}


def order(rng: random.Random) -> Record:
    """A purchase."""
    n, d, p = v.person(rng), v.date(rng), pick(rng, v.PRODUCTS)
    q, m = str(rng.randrange(2, 60)), str(rng.randrange(50, 5000))
    text = pick(
        rng,
        (
            "{n}于{d}购买了{q}件{p}，共花费{m}元。",
            "{d}，{n}订购{p}{q}件，总价{m}元。",
            "客户{n}在{d}下单，商品为{p}，数量{q}件，金额{m}元。",
        ),
    )
    return text.format(n=n, d=d, p=p, q=q, m=m), {"人名": n, "日期": d, "商品": p, "金额": m + "元", "数量": q + "件"}


def travel(rng: random.Random) -> Record:
    """A flight."""
    n, d, f = v.person(rng), v.date(rng), v.flight(rng)
    a, b = v.draw(rng, v.CITIES, 2)
    text = pick(rng, ("{n}将于{d}从{a}飞往{b}，航班号是{f}。", "{d}，{n}乘坐{f}航班从{a}前往{b}。"))
    return text.format(n=n, d=d, f=f, a=a, b=b), {"人名": n, "日期": d, "航班号": f, "出发地": a, "目的地": b}


def letter(rng: random.Random) -> Record:
    """An e-mail contact."""
    n, e, c = v.person(rng), v.mail(rng), v.company(rng)
    text = pick(
        rng, ("如有疑问，请联系{c}的{n}，邮箱是{e}。", "{n}在{c}工作，邮箱为{e}。", "简历请发送至{e}，{c}收件人{n}。")
    )
    return text.format(n=n, e=e, c=c), {"人名": n, "邮箱": e, "公司": c}


RECORDS: tuple[Callable[[random.Random], Record], ...] = (contact, meeting, order, travel, letter)


def extract_all_names(rng: random.Random) -> Sample:
    """All names of a list of people, in order."""
    names = v.people(rng, rng.randrange(2, 4))
    jobs = v.draw(rng, v.JOBS, len(names))
    text = "，".join(f"{n}是{j}" for n, j in zip(names, jobs, strict=True)) + "。" + pick(rng, FILLERS)
    if rng.random() < 0.5:
        text = f"参加{pick(rng, v.EVENTS)}的有{'、'.join(names)}。" + pick(rng, FILLERS)
    return Sample("extract", wrap(rng, [f.format(f="所有人名") for f in EXTRACT], text), "、".join(names), text)


def extract(rng: random.Random) -> Sample:
    """One field of one or two records; fields that both records have are not asked for."""
    if rng.random() < 0.15:
        return extract_all_names(rng)
    first, fields = pick(rng, RECORDS)(rng)
    text = first
    if rng.random() < 0.4:
        second, others = pick(rng, RECORDS)(rng)
        text = first + second
        fields = {k: x for k, x in {**fields, **others}.items() if (k in fields) != (k in others)} or {"人名": ""}
    if "" in fields.values():
        return extract(rng)
    text += pick(rng, FILLERS)
    asked = rng.sample(list(fields), min(2, len(fields)))
    question = wrap(rng, [f.format(f=asked[0]) for f in EXTRACT], text)
    follow = (
        (pick(rng, ("那{f}呢？", "再提取{f}", "{f}是什么？")).format(f=asked[1]), fields[asked[1]])
        if asked[1:]
        else None
    )
    return Sample("extract", question, fields[asked[0]], text, follow)
