"""Vocabulary of the translation task: about 150 words in each language, grouped by the objects that verbs take."""

from __future__ import annotations

# Chinese, English, third person singular
SUBJECTS = (
    ("我", "I", False),
    ("你", "you", False),
    ("他", "he", True),
    ("她", "she", True),
    ("我们", "we", False),
    ("他们", "they", False),
    ("我的父亲", "my father", True),
    ("我的母亲", "my mother", True),
    ("老师", "the teacher", True),
    ("医生", "the doctor", True),
    ("学生们", "the students", False),
    ("我的朋友", "my friend", True),
    ("那个女孩", "the girl", True),
    ("那个男孩", "the boy", True),
    ("我的哥哥", "my brother", True),
    ("邻居", "the neighbor", True),
)
# noun groups: measure word, Chinese, singular, plural
FOOD = (
    ("个", "苹果", "apple", "apples"),
    ("个", "鸡蛋", "egg", "eggs"),
    ("块", "蛋糕", "cake", "cakes"),
    ("个", "橘子", "orange", "oranges"),
    ("条", "鱼", "fish", "fish"),
    ("根", "香蕉", "banana", "bananas"),
)
GOODS = (
    ("本", "书", "book", "books"),
    ("支", "铅笔", "pencil", "pencils"),
    ("件", "衬衫", "shirt", "shirts"),
    ("顶", "帽子", "hat", "hats"),
    ("把", "雨伞", "umbrella", "umbrellas"),
    ("个", "杯子", "cup", "cups"),
    ("辆", "自行车", "bicycle", "bicycles"),
    ("张", "桌子", "table", "tables"),
    ("把", "椅子", "chair", "chairs"),
)
ANIMALS = (
    ("只", "猫", "cat", "cats"),
    ("条", "狗", "dog", "dogs"),
    ("只", "鸟", "bird", "birds"),
    ("匹", "马", "horse", "horses"),
    ("只", "兔子", "rabbit", "rabbits"),
    ("头", "牛", "cow", "cows"),
    ("只", "老虎", "tiger", "tigers"),
)
PAPERS = (
    ("封", "信", "letter", "letters"),
    ("个", "故事", "story", "stories"),
    ("首", "诗", "poem", "poems"),
    ("份", "报告", "report", "reports"),
)
# Chinese, base, third person, past, objects
VERBS = (
    ("吃", "eat", "eats", "ate", FOOD),
    ("买", "buy", "buys", "bought", GOODS + FOOD),
    ("看见", "see", "sees", "saw", ANIMALS + GOODS),
    ("写", "write", "writes", "wrote", PAPERS),
    ("读", "read", "reads", "read", PAPERS + GOODS[:1]),
    ("画", "draw", "draws", "drew", ANIMALS + GOODS),
    ("卖", "sell", "sells", "sold", GOODS + FOOD),
    ("找到", "find", "finds", "found", GOODS + ANIMALS),
    ("需要", "need", "needs", "needed", GOODS),
    ("喂", "feed", "feeds", "fed", ANIMALS),
)
COUNTS = (("一", "a"), ("两", "two"), ("三", "three"), ("四", "four"), ("五", "five"), ("六", "six"), ("十", "ten"))
ADJECTIVES = (
    ("红色的", "red"),
    ("黑色的", "black"),
    ("白色的", "white"),
    ("黄色的", "yellow"),
    ("大", "big"),
    ("小", "small"),
    ("新", "new"),
    ("旧", "old"),
    ("漂亮的", "beautiful"),
    ("便宜的", "cheap"),
    ("", ""),
    ("", ""),
    ("", ""),
)
PLACES = (
    ("在学校", "at school"),
    ("在家里", "at home"),
    ("在公园里", "in the park"),
    ("在图书馆", "in the library"),
    ("在商店", "in the shop"),
    ("在医院", "in the hospital"),
    ("在办公室", "in the office"),
    ("在花园里", "in the garden"),
    ("在海边", "by the sea"),
    ("", ""),
    ("", ""),
    ("", ""),
)
TIMES = (
    ("昨天", "yesterday", "past"),
    ("上周", "last week", "past"),
    ("昨天晚上", "last night", "past"),
    ("每天", "every day", "now"),
    ("每周", "every week", "now"),
    ("明天", "tomorrow", "will"),
    ("下周", "next week", "will"),
    ("明年", "next year", "will"),
)
GOALS = (
    ("去北京", "go to Beijing"),
    ("去上海", "go to Shanghai"),
    ("学习英语", "learn English"),
    ("学习中文", "learn Chinese"),
    ("回家", "go home"),
    ("听音乐", "listen to music"),
    ("踢足球", "play football"),
    ("打篮球", "play basketball"),
    ("喝茶", "drink tea"),
    ("喝咖啡", "drink coffee"),
    ("看电影", "watch a movie"),
    ("游泳", "swim"),
    ("唱歌", "sing"),
    ("跳舞", "dance"),
    ("做饭", "cook"),
    ("睡觉", "sleep"),
    ("休息", "rest"),
    ("跑步", "run"),
)
STATES = (
    ("很高兴", "happy"),
    ("很累", "tired"),
    ("很忙", "busy"),
    ("很饿", "hungry"),
    ("很生气", "angry"),
    ("很聪明", "smart"),
    ("很友好", "friendly"),
    ("很年轻", "young"),
    ("很担心", "worried"),
    ("很安静", "quiet"),
    ("很健康", "healthy"),
    ("很渴", "thirsty"),
)
