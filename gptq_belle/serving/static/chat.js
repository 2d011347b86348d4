// The chat page: conversations kept in this browser, answers streamed from the server that the page came from.
import { ask, figures, leave } from "./answer.js";
import { path } from "./conversation.js";
import { $ } from "./dom.js";
import { sends } from "./messages.js";
import { probeSystemPrompt } from "./settings.js";
import "./sidebar.js";
import { changed, on, save, state, words } from "./state.js";
import { keep } from "./store.js";

const HEALTH_EVERY = 10_000; // milliseconds; without an answer, 1000
const DRAFT_AFTER = 300; // milliseconds after a key press
let online = null; // the server's last /health, or a key of the texts
let draftTimer = 0;

function speak() {
  document.documentElement.lang = state.language === "zh" ? "zh-CN" : "en";
  document.documentElement.dataset.theme = state.theme;
  $("language").textContent = state.language === "zh" ? "EN" : "中文";
  $("language").lang = state.language === "zh" ? "en" : "zh-CN";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = words()[node.dataset.text];
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = words()[node.dataset.placeholder];
  for (const node of document.querySelectorAll("[data-label]")) node.title = node.ariaLabel = words()[node.dataset.label];
  $("prompt").ariaLabel = words().placeholder;
  report();
}

/** The line of figures: of the answer that is being generated, else of the last one that is shown. */
function report() {
  const { running, chat } = state;
  const last = path(chat).map((place) => chat.messages[place].figures).findLast(Boolean);
  const shown = running ? running.first && figures(running) : last;
  $("figures").textContent = shown ? words().figures(shown.tokens, shown.speed.toFixed(1), shown.first.toFixed(2)) : "";
  $("hint").textContent = state.stored === false ? words().storage_full : "";
  const memory = online?.memory_bytes && `${(online.memory_bytes / 1e9).toFixed(2)} GB`;
  $("status").textContent = memory ? words().memory(memory) : words()[online] ?? "";
}

async function look() {
  const before = online?.model;
  try {
    const response = await fetch("health");
    online = response.ok ? await response.json() : "loading";
  } catch {
    online = "offline";
  }
  if (online.model) $("model").textContent = document.title = online.model;
  if (online.model && online.model !== before) probeSystemPrompt();
  report();
  setTimeout(look, online.model ? HEALTH_EVERY : 1000);
}

function announceRun() {
  const { running, chat } = state;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  const place = path(chat).at(-1);
  const part = chat.messages[place]?.role === "assistant" ? ".body" : ".note";
  const text = document.querySelector(`[data-place="${place}"] ${part}`)?.innerText ?? "";
  $("announcer").textContent = running ? words().answering : text;
  report();
}

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}

function send() {
  const text = $("prompt").value.trim();
  if (!text) return;
  if (state.running) { // the text stays in its field
    $("hint").textContent = words().wait;
    return;
  }
  $("prompt").value = state.chat.draft = "";
  grow();
  ask(text);
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("prompt").onkeydown = (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  send();
};
$("prompt").oninput = () => {
  grow();
  state.chat.draft = $("prompt").value;
  clearTimeout(draftTimer);
  draftTimer = setTimeout(save, DRAFT_AFTER);
};
$("stop").onclick = () => {
  state.running?.stop();
  $("prompt").focus();
};
$("language").onclick = () => {
  keep("language", state.language = state.language === "zh" ? "en" : "zh");
  changed("words");
};
$("theme").onclick = () => {
  keep("theme", state.theme = state.theme === "dark" ? "light" : "dark");
  changed("words");
};
addEventListener("pagehide", () => {
  if (state.running) leave(state.running);
  save();
});
addEventListener("visibilitychange", () => save());
on("words", speak);
on("run", announceRun);
on("chat piece storage", report);
on("open", () => {
  $("prompt").value = state.chat.draft;
  grow();
});
changed("words", "open", "chats");
$("prompt").focus();
look();
