// The messages of the conversation that is shown, with their buttons.
import { answerAgain, ask, askInstead } from "./answer.js";
import { alternatives, path, show } from "./conversation.js";
import { $, button, copyButton, element } from "./dom.js";
import { render } from "./markdown.js";
import { changed, on, save, state, words } from "./state.js";

const NEAR_THE_END = 80; // pixels: a reader who is this close follows the answer
const ANSWER_ONLY = ["length", "stopped", "interrupted"]; // ends of an answer that are no errors
let shown = null; // the conversation that was drawn last
let painting = false;

/** Whether a key press sends a text: Enter, but not with Shift, and not the Enter that ends a word of an input method. */
export function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

function draw() {
  const { chat, running } = state;
  const log = $("log");
  const focused = focusedButton();
  const follow = shown !== chat || isNearTheEnd() || running?.chat === chat && running.place < 0;
  const position = log.scrollTop;
  shown = chat;
  const places = path(chat);
  log.replaceChildren(...places.map((place) => message(place, place === places.at(-1))));
  if (running?.chat === chat && running.place < 0) log.append(waiting());
  if (!places.length) log.append(welcome());
  log.scrollTop = follow ? log.scrollHeight : position;
  if (focused) (document.querySelector(focused) ?? $("prompt")).focus();
}

/** A selector of the button in a message that has the focus, which drawing replaces. */
function focusedButton() {
  const { action } = document.activeElement?.dataset ?? {};
  return action && `[data-place="${document.activeElement.closest("[data-place]").dataset.place}"] [data-action="${action}"]`;
}

function message(place, isLast) {
  const { chat, running } = state;
  if (chat.edit?.place === place) return editor(chat);
  const { role, content } = chat.messages[place];
  const isRunning = running?.chat === chat && running.place === place;
  const body = element("div", { className: isRunning ? "body waiting" : "body" });
  if (role === "user") body.textContent = content;
  else render(body, content, words());
  const node = element("article", { className: `message ${role}`, "aria-label": words()[role], "data-place": place }, body);
  if (!isRunning) node.append(...failure(chat.messages[place]), tools(place, isLast));
  return node;
}

function failure({ role, failure: why }) {
  if (!why) return [];
  const text = words().failures[why.code] ?? words().failures.server;
  const isError = role === "user" || !ANSWER_ONLY.includes(why.code);
  const prefix = role === "user" ? words().no_answer : "";
  const detail = why.detail ? element("span", { lang: "en" }, ` ${why.detail}`) : "";
  return [element("p", { className: isError ? "note error" : "note" }, prefix + text, detail)];
}

function tools(place, isLast) {
  const { chat, running } = state;
  const { role, content } = chat.messages[place];
  const row = element("div", { className: "tools" });
  const add = (action, run, label = words()[action]) => row.append(button(label, run, { "data-action": action }));
  if (!running) pager(place, add, row);
  row.append(copyButton(words(), () => content));
  if (running) return row;
  if (role === "user") add("edit", () => edit(place));
  if (isLast) add(role === "user" ? "retry" : "regenerate", answerAgain);
  return row;
}

/** Buttons for the alternatives of a message. */
function pager(place, add, row) {
  const { chat } = state;
  const others = alternatives(chat, place);
  const position = others.indexOf(place);
  if (others.length < 2) return;
  const go = (step) => {
    show(chat, others[position + step]);
    save();
    changed("chat");
  };
  if (position > 0) add("previous", () => go(-1), "‹");
  row.append(element("span", {}, `${position + 1}/${others.length}`));
  if (position + 1 < others.length) add("next", () => go(1), "›");
  for (const [action, label] of [["previous", words().previous], ["next", words().next]]) {
    row.querySelector(`[data-action="${action}"]`)?.setAttribute("aria-label", label);
  }
}

function edit(place) {
  state.chat.edit = { place, text: state.chat.messages[place].content }; // kept with the conversation, as a draft is
  draw();
  document.querySelector(".message textarea").focus();
}

function editor(chat) {
  const { place, text } = chat.edit;
  const field = element("textarea", { value: text, rows: 3, "aria-label": words().edit, "data-action": "text" });
  const close = () => {
    delete chat.edit;
    draw();
    $("prompt").focus();
  };
  const send = () => {
    if (!field.value.trim() || state.running) return;
    delete chat.edit;
    askInstead(place, field.value.trim());
  };
  field.oninput = () => (chat.edit.text = field.value);
  field.onkeydown = (event) => {
    if (event.key === "Escape") close();
    if (!sends(event)) return;
    event.preventDefault();
    send();
  };
  const tools = element("div", { className: "tools" }, button(words().send, send), button(words().cancel, close));
  return element("article", { className: "message user", "aria-label": words().edit, "data-place": place }, field, tools);
}

function waiting() {
  return element("article", { className: "message assistant", "aria-label": words().assistant },
    element("div", { className: "body waiting" }));
}

function welcome() {
  return element("div", { className: "empty" }, element("p", {}, words().hello), ...words().examples.map(
    (example) => button(example, () => state.running || ask(example))));
}

function isNearTheEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_THE_END;
}

/** Show the text that has arrived, at most once per frame of the screen. */
function paint() {
  if (painting) return;
  painting = true;
  requestAnimationFrame(() => {
    painting = false;
    const { running, chat } = state;
    const body = running?.chat === chat && document.querySelector(`[data-place="${running.place}"] .body`);
    if (!body) return;
    const follow = isNearTheEnd();
    render(body, chat.messages[running.place].content, words());
    if (follow) $("log").scrollTop = $("log").scrollHeight;
  });
}

on("chat words", draw);
on("piece", paint);
