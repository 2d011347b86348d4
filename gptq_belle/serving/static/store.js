// What this browser keeps: one entry per conversation and per setting. Without storage (it is full, or forbidden) the
// page works with what it has in memory, and says so.
import { isConversation } from "./conversation.js";

const PREFIX = "gptq_belle.";
const CHAT = `${PREFIX}chat.`;
const FORMAT = "gptq_belle.conversations";

/** A value that was kept, else `otherwise`. */
export function kept(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keep a value; whether that succeeded. */
export function keep(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** All conversations that are kept, by id. */
export function keptChats() {
  let names = [];
  try {
    names = Object.keys(localStorage).filter((name) => name.startsWith(CHAT));
  } catch {
    // no storage
  }
  const chats = names.map((name) => kept(name.slice(PREFIX.length), null)).filter(isConversation);
  return new Map(chats.map((chat) => [chat.id, chat]));
}

/** Keep a conversation; whether that succeeded. */
export function keepChat(chat) {
  return keep(`chat.${chat.id}`, chat);
}

/** Forget a conversation. */
export function forgetChat(id) {
  try {
    localStorage.removeItem(CHAT + id);
  } catch {
    // no storage, so it is not there
  }
}

/** Call `changed` with the conversation (null: forgotten) and its id when another tab of this page keeps one. */
export function onOtherTab(changed) {
  addEventListener("storage", ({ key, newValue }) => {
    if (!key?.startsWith(CHAT)) return;
    const chat = newValue && kept(key.slice(PREFIX.length), null);
    changed(isConversation(chat) ? chat : null, key.slice(CHAT.length));
  });
}

/** The text of a file with conversations. */
export function exported(chats) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations: [...chats] }, null, 1);
}

/** The conversations of a file; null if it holds none. */
export function imported(text) {
  try {
    const { format, conversations } = JSON.parse(text);
    return format === FORMAT && conversations.every(isConversation) ? conversations : null;
  } catch {
    return null;
  }
}
