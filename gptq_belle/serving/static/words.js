// Texts of the chat page.
export const WORDS = {
  zh: {
    fresh: "新对话", theme: "切换深色/浅色主题", settings: "设置", send: "发送", stop: "停止", close: "关闭",
    placeholder: "输入消息，按 Enter 发送", regenerate: "重新生成", copy: "复制", copied: "已复制",
    temperature: "温度（0 为贪心解码）", top_p: "Top-p", top_k: "Top-k（0 表示不限制）", repetition_penalty: "重复惩罚",
    max_tokens: "最大词元数（留空表示不限制）", seed: "随机种子", system: "系统提示词", key: "API 密钥",
    loading: "正在加载模型…", offline: "无法连接服务器", hello: "有什么可以帮您？", stopped: "已停止",
    figures: (tokens, speed, first) => `${tokens} 个词元 · ${speed} 词元/秒 · 首词元延迟 ${first} 秒`,
    memory: (size) => `内存占用 ${size}`, length: "（达到长度上限）",
    examples: ["写一首关于春天的诗", "把“早上好”翻译成英文", "用三句话介绍一下北京"],
  },
  en: {
    fresh: "New chat", theme: "Switch between dark and light theme", settings: "Settings", send: "Send", stop: "Stop", close: "Close",
    placeholder: "Type a message; Enter sends it", regenerate: "Regenerate", copy: "Copy",
    copied: "Copied", temperature: "Temperature (0: greedy)", top_p: "Top-p", top_k: "Top-k (0: no limit)",
    repetition_penalty: "Repetition penalty", max_tokens: "Maximum tokens (empty: no limit)", seed: "Random seed", system: "System prompt",
    key: "API key", loading: "Loading the model…", offline: "Cannot reach the server", hello: "How can I help?",
    stopped: "Stopped", figures: (tokens, speed, first) => `${tokens} tokens · ${speed} tokens/s · first token after ${first} s`,
    memory: (size) => `memory ${size}`, length: "(length limit reached)",
    examples: ["写一首关于春天的诗", "Translate to Chinese: good morning", "Introduce Beijing in three sentences"],
  },
};
