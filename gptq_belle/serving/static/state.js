// What the parts of the page share: the conversations, the settings, and the answer that is being generated.
import { newConversation } from "./conversation.js";
import { forgetChat, keep, keepChat, kept, keptChats } from "./store.js";
import { WORDS } from "./words.js";

const chats = keptChats();

/** `running` is {chat, question, place, stop, ...} while an answer is generated (see answer.js), else null. */
export const state = {
  chats, chat: chats.get(kept("current", "")) ?? newConversation(), running: null,
  language: kept("language", navigator.language.startsWith("zh") ? "zh" : "en"),
  theme: kept("theme", matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"),
};
export const words = () => WORDS[state.language];

const changes = new EventTarget();

/** Call `react` when one of these changes: "chat" (its messages, or which one it is), "open" (another one is shown),
 * "piece" (text of the answer that is being generated), "chats" (the list), "run" (an answer starts or ends), "words"
 * (language or theme), "storage" (it is full, or no longer). */
export function on(names, react) {
  for (const name of names.split(" ")) changes.addEventListener(name, react);
}

export function changed(...names) {
  for (const name of names) changes.dispatchEvent(new Event(name));
}

/** Keep a conversation that is not empty. */
export function save(chat = state.chat) {
  const isNew = !state.chats.has(chat.id);
  if (isNew && !chat.messages.length && !chat.draft.trim()) return;
  state.chats.set(chat.id, chat);
  state.stored = keepChat(chat) && (chat !== state.chat || keep("current", chat.id));
  changed("storage");
  if (isNew) changed("chats");
}

/** Show a conversation. */
export function open(chat) {
  save();
  state.chat = chat;
  keep("current", chat.id);
  changed("open", "chat", "chats");
}

/** Forget a conversation, and stop its answer. */
export function remove(chat) {
  if (state.running?.chat === chat) state.running.stop();
  state.chats.delete(chat.id);
  forgetChat(chat.id);
  if (state.chat === chat) {
    state.chat = newConversation();
    changed("open", "chat");
  }
  changed("chats");
}
