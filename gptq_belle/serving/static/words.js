// The page's words.
export const WORDS = {
  zh: {
    fresh: "新对话", theme: "深色或浅色", settings: "设置", send: "发送", stop: "停止", close: "完成",
    placeholder: "输入消息，回车发送", regenerate: "重新生成", copy: "复制", copied: "已复制",
    temperature: "温度", top_p: "top-p", top_k: "top-k（0 为不限）", repetition_penalty: "重复惩罚",
    max_tokens: "最多词元（空为不限）", seed: "随机种子", system: "系统提示", key: "API 密钥",
    loading: "正在加载模型…", offline: "连接不上服务器", hello: "想聊点什么？", stopped: "已停止",
    figures: (tokens, speed, first) => `${tokens} 个词元 · ${speed} 词元/秒 · 首词元 ${first} 秒`,
    memory: (size) => `内存 ${size}`, length: "（达到长度上限）",
    examples: ["写一首关于春天的诗", "把“早上好”翻译成英文", "用三句话介绍一下北京"],
  },
  en: {
    fresh: "New chat", theme: "Dark or light", settings: "Settings", send: "Send", stop: "Stop", close: "Done",
    placeholder: "Message; Enter sends", regenerate: "Regenerate", copy: "Copy",
    copied: "Copied", temperature: "Temperature", top_p: "top-p", top_k: "top-k (0: all)",
    repetition_penalty: "Repetition penalty", max_tokens: "Most tokens (empty: all)", seed: "Seed", system: "System prompt",
    key: "API key", loading: "Loading the model…", offline: "The server cannot be reached", hello: "What shall we talk about?",
    stopped: "Stopped", figures: (tokens, speed, first) => `${tokens} tokens · ${speed} tokens/s · first after ${first} s`,
    memory: (size) => `memory ${size}`, length: "(length limit reached)",
    examples: ["写一首关于春天的诗", "Translate to Chinese: good morning", "Introduce Beijing in three sentences"],
  },
};
