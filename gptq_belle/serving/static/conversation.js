// A conversation is a tree of messages, so that an edited question or a new answer replaces nothing:
// {id, title, updated, draft, edit?, leaf, messages: [{parent, role, content, failure?, figures?}]}.
// `parent` and `leaf` are places in `messages` (-1: none); what is shown and sent is the path from the root to `leaf`.

const TITLE_LENGTH = 40;

/** An empty conversation. */
export function newConversation() {
  const id = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;
  return { id, title: "", updated: Date.now(), draft: "", leaf: -1, messages: [] };
}

/** Add a message below `parent` and show it; returns its place. */
export function append(chat, parent, role, content) {
  chat.messages.push({ parent, role, content });
  chat.leaf = chat.messages.length - 1;
  chat.updated = Date.now();
  if (!chat.title) chat.title = content.trim().replace(/\s+/g, " ").slice(0, TITLE_LENGTH);
  return chat.leaf;
}

/** Places of the messages from the root to `end`. */
export function path(chat, end = chat.leaf) {
  const places = [];
  for (let place = end; place >= 0; place = chat.messages[place].parent) places.unshift(place);
  return places;
}

/** Places of the messages that are alternatives to the one at `place`, itself included. */
export function alternatives(chat, place) {
  const { parent, role } = chat.messages[place];
  return [...chat.messages.keys()].filter((other) => chat.messages[other].parent === parent
    && chat.messages[other].role === role);
}

/** Show the message at `place` and the newest messages after it. */
export function show(chat, place) {
  let leaf = place;
  for (let next = place; next >= 0;) {
    leaf = next;
    next = chat.messages.findLastIndex((message) => message.parent === leaf);
  }
  chat.leaf = leaf;
}

/** Messages of a request for an answer to the question at `place`. Questions that got no answer are left out: a prompt
 * alternates between questions and answers. */
export function request(chat, place, system) {
  const places = path(chat, place);
  const sent = places.filter((each, position) => {
    const [message, next] = [chat.messages[each], chat.messages[places[position + 1]]];
    return each === place || message.role === "assistant" || next?.role === "assistant";
  }).map((each) => ({ role: chat.messages[each].role, content: chat.messages[each].content }));
  return system ? [{ role: "system", content: system }, ...sent] : sent;
}

/** Whether a value of a file or of the storage is a conversation. */
export function isConversation(value) {
  const { id, title, updated, leaf, messages } = value ?? {};
  return typeof id === "string" && typeof title === "string" && Number.isFinite(updated) && Array.isArray(messages)
    && isPlace(leaf, messages.length) && messages.every((message, place) => isMessage(message, place));
}

function isMessage(message, place) {
  return ["user", "assistant"].includes(message?.role) && typeof message.content === "string"
    && isPlace(message.parent, place); // a parent comes before its replies, so a path has an end
}

function isPlace(value, end) {
  return Number.isInteger(value) && value >= -1 && value < end;
}
