"""Task classification: sentiment, topic and intent of generated sentences."""

from __future__ import annotations

import random

from .sample import Sample, pick, wrap
from .vocabulary import CITIES, clock, person

# subject: aspects, positive and negative words
REVIEWS: dict[str, tuple[str, str, str]] = {
    "餐厅": (
        "菜 服务 环境 汤 甜点",
        "很好吃 很新鲜 让人满意 特别棒 非常好 不差",
        "很难吃 太差了 让人失望 很糟糕 不新鲜 不好",
    ),
    "酒店": (
        "房间 服务 位置 早餐 床",
        "很干净 很舒服 让人满意 特别棒 非常好 不差",
        "很脏 太差了 让人失望 很糟糕 不干净 不好",
    ),
    "手机": (
        "屏幕 电池 声音 相机 手感",
        "很清楚 很耐用 让人满意 特别棒 非常好 不差",
        "很模糊 太差了 让人失望 很糟糕 不耐用 不好",
    ),
    "电影": (
        "故事 演员 音乐 画面 结局",
        "很感人 很精彩 让人满意 特别棒 非常好 不差",
        "很无聊 太差了 让人失望 很糟糕 不精彩 不好",
    ),
    "课程": (
        "内容 老师 练习 教材 作业",
        "很有趣 很实用 让人满意 特别棒 非常好 不差",
        "很枯燥 太差了 让人失望 很糟糕 不实用 不好",
    ),
    "衣服": (
        "颜色 质量 尺寸 布料 样子",
        "很漂亮 很合身 让人满意 特别棒 非常好 不差",
        "很难看 太差了 让人失望 很糟糕 不合身 不好",
    ),
}
TOPICS: dict[str, tuple[str, ...]] = {
    "体育": (
        "{n}在{c}的比赛中打进两个球",
        "{c}队以大比分赢得冠军",
        "{n}打破了一百米跑步纪录",
        "{c}马拉松明早开跑",
        "教练{n}公布了球队名单",
    ),
    "财经": (
        "{c}的股票市场今天上涨",
        "{c}银行宣布降低贷款利率",
        "{n}的公司利润增长一倍",
        "{c}房价连续下跌",
        "投资人{n}买下这家企业",
    ),
    "科技": (
        "{c}的研究人员发布新型芯片",
        "{n}设计出会写字的机器人",
        "{c}建成人工智能实验室",
        "{n}团队的软件获得升级",
        "卫星从{c}发射成功",
    ),
    "娱乐": (
        "歌手{n}在{c}举行演唱会",
        "演员{n}主演的新电影上映",
        "{n}的新专辑受到歌迷喜爱",
        "{c}电视节目请来明星{n}",
        "导演{n}开拍新剧",
    ),
    "教育": (
        "{c}的高考时间公布",
        "{n}老师改进课堂教学方法",
        "{c}大学今年扩大招生",
        "学生{n}获得奖学金",
        "{c}中小学明天开学",
    ),
    "健康": (
        "医生{n}提醒大家多喝水",
        "{c}医院开展免费体检",
        "{n}介绍预防感冒的办法",
        "专家{n}谈如何改善睡眠",
        "{c}推广流感疫苗接种",
    ),
}
INTENTS: dict[str, tuple[str, ...]] = {
    "查天气": ("{c}{t}会下雨吗", "{t}{c}冷不冷", "帮我看看{c}{t}的气温"),
    "订票": ("我要一张{t}去{c}的火车票", "帮我买{t}到{c}的机票", "{t}去{c}还有座位吗，帮我订一个"),
    "设闹钟": ("{t}叫我起床去{c}", "{t}提醒我给{n}打电话", "定一个{t}的闹钟"),
    "播放音乐": ("放一首{n}的歌", "我想听{n}唱的歌曲", "{t}播放{n}的专辑"),
    "打电话": ("给{n}打个电话", "帮我拨通{n}的手机", "{t}联系一下{c}的{n}"),
    "导航": ("怎么去{c}的{n}家", "带我去{c}机场", "从这里开车到{c}走哪条路"),
}
TIMES = ("今天", "明天", "后天", "周一", "周二", "周三", "周五", "周末", "下周")


def sentiment(rng: random.Random) -> tuple[str, str]:
    """Two positive (正面) or negative (负面) remarks, or one of each (中性)."""
    kind = pick(rng, list(REVIEWS))
    aspects, good, bad = (words.split() for words in REVIEWS[kind])
    one, two = rng.sample(aspects, 2)
    label = pick(rng, ("正面", "负面", "中性"))
    if label == "中性":
        first, second = (good, bad) if rng.random() < 0.5 else (bad, good)
        return f"{kind}的{one}{pick(rng, first)}，但是{two}{pick(rng, second)}。", label
    words = good if label == "正面" else bad
    start = pick(rng, ("{k}的{a}", "我觉得{k}的{a}", "{p}说{k}的{a}", "昨天试过的{k}，{a}"))
    opening = start.format(k=kind, a=one, p=person(rng))
    return f"{opening}{pick(rng, words)}，{two}也{pick(rng, words)}。".replace("也太", "也是太"), label


def labelled(rng: random.Random, table: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    """A sentence with its topic or intent."""
    label = pick(rng, list(table))
    when = pick(rng, TIMES) + (clock(rng) if table is INTENTS and rng.random() < 0.5 else "")
    return pick(rng, table[label]).format(c=pick(rng, CITIES), n=person(rng), t=when) + "。", label


def classification(rng: random.Random) -> Sample:
    """A sentence with its label."""
    task = pick(rng, ("sentiment", "topic", "intent"))
    if task == "sentiment":
        text, label = sentiment(rng)
        forms = (
            "判断下面评论的情感是正面、负面还是中性",
            "这条评论的情感倾向是什么？正面、负面或中性",
            "对下列评论做情感分类",
            "请判断评价的情感",
        )
    elif task == "topic":
        text, label = labelled(rng, TOPICS)
        forms = (
            "判断下面新闻的类别：体育、财经、科技、娱乐、教育、健康",
            "这条新闻属于哪一类",
            "给下面的新闻分类",
            "请判断新闻的主题",
        )
    else:
        text, label = labelled(rng, INTENTS)
        forms = (
            "判断下面这句话的意图",
            "用户说的这句话想做什么",
            "识别用户的意图：查天气、订票、设闹钟、播放音乐、打电话、导航",
            "请给这句话标注意图",
        )
    return Sample("classification", wrap(rng, forms, text), label, text)
