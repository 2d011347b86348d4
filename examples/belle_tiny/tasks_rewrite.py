"""Task rewrite: change the voice, mood or politeness of a sentence."""

from __future__ import annotations

import random

from .sample import Sample, pick, words, wrap

PEOPLE = words("小猫 小狗 弟弟 妹妹 哥哥 爸爸 妈妈 爷爷 奶奶 老师 同学 邻居 工人 司机 客人 经理")
DEEDS = (
    ("吃", "鱼 蛋糕 苹果 面包 饺子"),
    ("打碎", "花瓶 杯子 镜子 碗"),
    ("拿走", "雨伞 书 钥匙 报纸 手机"),
    ("卖掉", "房子 汽车 自行车 电脑"),
    ("修好", "电脑 汽车 空调 自行车"),
    ("弄丢", "钥匙 钱包 手机 书"),
    ("洗干净", "衣服 碗 水果 汽车"),
    ("送走", "客人 礼物 旧书 小狗"),
)
ORDERS = words(
    "把窗户关上 把门打开 把书给我 等我一下 安静一点 快点回来 把灯关掉 "
    "帮我拿一下水 说慢一点 把文件发给我 早点到 把桌子擦干净"
)
ROUTINES = words(
    "每天去公园跑步 喜欢吃苹果 会说英语 在北京工作 想买一辆车 "
    "认识那位老师 住在学校附近 看过这部电影 参加了比赛 知道答案"
)
NEGATED = (
    "每天不去公园跑步",
    "不喜欢吃苹果",
    "不会说英语",
    "不在北京工作",
    "不想买一辆车",
    "不认识那位老师",
    "不住在学校附近",
    "没看过这部电影",
    "没参加比赛",
    "不知道答案",
)


def rewrite(rng: random.Random) -> Sample:
    """Active to passive and back, polite form, question, negation, or indirect speech."""
    who = pick(rng, PEOPLE)
    owner = pick(rng, ("我", "我的", "小明的", "小红的", "小刚的", "他的", "她的"))
    who = who if owner == "我" else owner + who
    verb, things = pick(rng, DEEDS)
    patient = pick(rng, ("那", "这", "新买的", "昨天的", "", "心爱的")) + pick(rng, things.split())
    index = rng.randrange(len(ROUTINES))
    instruction, source, target = pick(
        rng,
        (
            ("改成被字句", f"{who}把{patient}{verb}了。", f"{patient}被{who}{verb}了。"),
            ("改成把字句", f"{patient}被{who}{verb}了。", f"{who}把{patient}{verb}了。"),
            ("改得更有礼貌", f"{who}，{pick(rng, ORDERS)}。", ""),
            ("改成疑问句", f"{who}{ROUTINES[index]}。", f"{who}{ROUTINES[index]}吗？"),
            ("改成否定句", f"{who}{ROUTINES[index]}。", f"{who}{NEGATED[index]}。"),
            ("改成间接引语", f"{who}说：“我{ROUTINES[index]}。”", f"{who}说自己{ROUTINES[index]}。"),
        ),
    )
    target = target or source.replace("，", "，麻烦您", 1).replace("。", "，谢谢。")
    forms = [f.format(i=instruction) for f in ("把下面的句子{i}", "请将这句话{i}", "将下列句子{i}", "请把句子{i}")]
    return Sample("rewrite", wrap(rng, forms, source), target, source)
