"""Words for the generator: people, places, dates and things. Names and numbers are generated."""

from __future__ import annotations

import random

from .sample import pick, words

SURNAMES = "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕"
GIVEN = (
    "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超秀霞平刚桂英华建文玉兰红梅春晓辉波宁浩宇轩雨欣怡佳琪思远子涵梓萱"
    "一诺俊泽嘉慧雪婷鹏飞龙海天成志国庆福安乐康健东南北西月星云风松柏青山石川江河清源永恒立新民生荣光"
)
CITIES = words(
    "北京 上海 广州 深圳 杭州 南京 武汉 成都 重庆 西安 天津 苏州 长沙 青岛 大连 厦门 宁波 无锡 济南 福州 "
    "郑州 昆明 合肥 南昌 贵阳 太原 兰州 海口 哈尔滨 长春 沈阳 桂林 三亚 珠海 洛阳 扬州"
)
JOBS = words("医生 教师 律师 厨师 司机 护士 记者 工程师 会计 画家 歌手 农民 警察 演员 作家 设计师 程序员 摄影师")
HOBBIES = words("游泳 跑步 画画 唱歌 跳舞 下棋 爬山 钓鱼 看书 打篮球 踢足球 弹钢琴 写字 摄影 做饭 旅游 听音乐 看电影")
COLOURS = words("红色 蓝色 绿色 黄色 白色 黑色 紫色 粉色 灰色 橙色")
FRUITS = words("苹果 香蕉 橘子 葡萄 西瓜 草莓 桃子 梨 芒果 樱桃 白菜 土豆 番茄 黄瓜 萝卜 茄子 玉米 鸡蛋")
SUBJECTS = words("语文 数学 英语 物理 化学 历史 地理 生物 音乐 美术 体育")
PRODUCTS = words("手机 电脑 书包 台灯 雨伞 水杯 毛衣 皮鞋 手表 耳机 键盘 椅子 被子 帽子 相机 冰箱 闹钟 钢笔")
EVENTS = words("音乐节 读书会 马拉松 书画展 科技展 运动会 招聘会 美食节 电影节 义卖会 花展 车展")
ROOMS = words("一号会议室 二号会议室 三号会议室 大礼堂 图书馆 报告厅 多功能厅 学生活动中心 体育馆 办公楼")
COMPANY_HEADS = words("星 海 天 华 东 金 新 大 明 远 宏 云")
COMPANY_TAILS = words("辰 通 达 信 利 丰 联 创 源 腾 盛 博")
COMPANY_KINDS = words("科技公司 食品公司 贸易公司 汽车公司 软件公司 医药公司 服装公司 物流公司")
MAIL_WORDS = words("tiger lion apple river cloud panda happy green lucky star moon sunny")


def person(rng: random.Random) -> str:
    """A Chinese name of two or three characters; there are about 300,000."""
    given = pick(rng, GIVEN) + (pick(rng, GIVEN) if rng.random() < 0.6 else "")
    return pick(rng, SURNAMES) + given


def people(rng: random.Random, count: int) -> list[str]:
    """Names with different surnames, so that their first characters differ."""
    names: dict[str, str] = {}
    while len(names) < count:
        name = person(rng)
        names.setdefault(name[0], name)
    return list(names.values())


def phone(rng: random.Random) -> str:
    """A mobile number with eleven digits, or sometimes a landline number with eight."""
    digits = 9 if rng.random() < 0.6 else 6
    return (
        ("1" if digits == 9 else "")
        + str(rng.randrange(3, 10))
        + "".join(str(rng.randrange(10)) for _ in range(digits + (digits == 6)))
    )


def date(rng: random.Random) -> str:
    """A month and a day, sometimes with the year."""
    day = f"{rng.randrange(1, 13)}月{rng.randrange(1, 29)}日"
    return f"{rng.randrange(2001, 2025)}年{day}" if rng.random() < 0.3 else day


def clock(rng: random.Random) -> str:
    """A time of day."""
    hour = rng.randrange(1, 12)
    return f"{pick(rng, ('上午', '下午', '晚上'))}{hour}点{pick(rng, ('', '半', '十分', '二十分'))}"


def mail(rng: random.Random) -> str:
    """An e-mail address."""
    return f"{pick(rng, MAIL_WORDS)}{rng.randrange(10, 1000)}@mail.com"


def company(rng: random.Random) -> str:
    """A company name; there are about 1,150."""
    return pick(rng, COMPANY_HEADS) + pick(rng, COMPANY_TAILS) + pick(rng, COMPANY_KINDS)


def flight(rng: random.Random) -> str:
    """A flight number such as CA1234."""
    return pick(rng, ("CA", "MU", "CZ", "HU")) + str(rng.randrange(1000, 10000))


def draw(rng: random.Random, options: list[str], count: int) -> list[str]:
    """Different options in random order."""
    return rng.sample(options, count)
