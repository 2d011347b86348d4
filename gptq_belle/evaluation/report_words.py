"""The words of a report's page in English and Chinese: settings, metrics, classes and parts of a model."""

CLASSES_ZH = {
    "open_qa": "开放问答", "closed_qa": "阅读问答", "extract": "信息抽取", "classification": "分类",
    "summarization": "摘要", "rewrite": "改写", "translation": "翻译", "brainstorming": "头脑风暴", "math": "数学",
    "code": "代码", "generation": "文本生成",
}
METRICS = {  # of ClassMetrics: English, Chinese, digits
    "exact": ("exact match, %", "完全匹配 %", 1), "f1": ("character F1, %", "字符 F1 %", 1),
    "rouge_l": ("ROUGE-L, %", "ROUGE-L %", 1), "nll": ("NLL of the reference, a token", "参考答案每词元负对数似然", 4),
    "agreement": ("tokens as full precision, %", "与全精度相同的词元 %", 1),
    "identical": ("answers as full precision, %", "与全精度相同的回答 %", 1),
}
PARTS_ZH = {  # of `Inspection.parts`
    "packed weights": "打包权重", "scales and zero points": "缩放系数与零点", "group indices": "分组索引",
    "packed head": "打包的 lm_head", "head": "lm_head", "embeddings": "词嵌入", "unpacked linears": "未打包的线性层",
    "norms and biases": "归一化与偏置",
}
COLUMNS = {  # of the record's table of linears
    "name": ("linear", "线性层"), "error": ("error", "误差"), "damp": ("damping", "阻尼"),
    "seconds": ("seconds", "秒"), "inputs": ("inputs", "输入"), "outputs": ("outputs", "输出"),
    "bits": ("bits", "位数"), "won": ("chosen candidate", "选中的候选"),
    "held_out": ("errors on held-out rows", "保留数据上的误差"),
}
SETTINGS = {  # keys of a quantization record, and of its parts
    "source": ("source model", "源模型"),
    "bits": ("bits per weight", "每个权重的位数"),
    "group_size": ("group size", "分组大小"),
    "sym": ("symmetric", "对称量化"),
    "act_order": ("activation order in the file", "文件中记录激活值排序"),
    "damp": ("damping", "阻尼"),
    "method": ("method", "方法"),
    "preset": ("preset", "预设"),
    "without": ("disabled techniques", "停用的技术"),
    "positive_scales": ("positive scales only", "仅正缩放系数"),
    "overrides": ("overrides", "单独设置的线性层"),
    "head_bits": ("bits of the lm_head", "lm_head 位数"),
    "auto_bits": ("bit budget", "位数预算"),
    "average_bits": ("average bits per weight", "平均位数"),
    "mean_error": ("mean error of the outputs", "输出平均误差"),
    "readback_error": ("difference after reading back", "回读差异"),
    "bytes_on_disk": ("weights on disk", "权重文件大小"),
    "seconds": ("time", "用时"),
    "peak_memory": ("peak memory", "峰值内存"),
    "calibration source": ("calibration data", "校准数据"),
    "calibration documents": ("calibration documents", "校准文档数"),
    "calibration rows": ("calibration rows", "校准数据行数"),
    "calibration seq_len": ("tokens per calibration row", "每行校准数据的词元数"),
    "calibration seed": ("random seed of the calibration data", "校准数据的随机种子"),
    "calibration sha256": ("SHA-256 of the calibration rows", "校准数据的 SHA-256"),
    "notes": ("notes", "备注"),
    "held-out rows chose": ("chosen on held-out rows", "按保留数据选择"),
    "refined": ("block refinement", "块级联合优化"),
}
