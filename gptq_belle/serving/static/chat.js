// The chat page: a conversation kept in this browser, answers streamed from the server that the page came from.
import { render } from "./markdown.js";
import { completion } from "./stream.js";
import { WORDS } from "./words.js";

const DEFAULTS = { temperature: 0.35, top_p: 0.85, top_k: 30, repetition_penalty: 1.2, max_tokens: "", seed: "", system: "", key: "" };
const LATELY = 1e4; // milliseconds between two looks at the server's state
const $ = (id) => document.getElementById(id);

const kept = (name, otherwise) => {
  try {
    return JSON.parse(localStorage.getItem(`gptq_belle.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
};
const keep = (name, value) => localStorage.setItem(`gptq_belle.${name}`, JSON.stringify(value));

let messages = kept("messages", []);
let settings = { ...DEFAULTS, ...kept("settings", {}) };
let language = kept("language", navigator.language.startsWith("zh") ? "zh" : "en");
let theme = kept("theme", matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
let running = null; // the AbortController of the answer that is coming
let figures = null;
let online = null; // what /health said last
const words = () => WORDS[language];

function button(label, action) {
  const node = document.createElement("button");
  node.type = "button";
  node.textContent = label;
  node.onclick = action;
  return node;
}

function bubble(message) {
  const node = document.createElement("article");
  node.className = `message ${message.role}${message.failed ? " failed" : ""}`;
  const body = document.createElement("div");
  body.className = "body";
  const tools = document.createElement("div");
  tools.className = "tools";
  node.append(body, tools);
  fill(body, message);
  return { node, body, tools };
}

function fill(body, message) {
  if (message.role === "user" || message.failed) body.textContent = message.content;
  else body.replaceChildren(...render(message.content));
  if (message.note) body.append(` ${words()[message.note]}`);
}

function draw() {
  const log = $("log");
  log.replaceChildren(...messages.map((message, place) => {
    const { node, body, tools } = bubble(message);
    const last = place === messages.length - 1;
    if (last && running) body.classList.add("waiting");
    else if (message.role === "assistant") {
      const copy = button(words().copy, async () => {
        await navigator.clipboard.writeText(message.content);
        copy.textContent = words().copied;
      });
      tools.append(copy);
      if (last) tools.append(button(words().regenerate, regenerate));
    }
    return node;
  }));
  if (!messages.length) log.append(welcome());
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  log.scrollTop = log.scrollHeight;
}

function welcome() {
  const node = document.createElement("div");
  node.className = "empty";
  node.append(words().hello, ...words().examples.map((example) => button(example, () => ask(example))));
  return node;
}

function speak() {
  document.documentElement.lang = language;
  document.documentElement.dataset.theme = theme;
  $("language").textContent = language === "zh" ? "EN" : "中文";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = words()[node.dataset.text];
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = words()[node.dataset.placeholder];
  for (const node of document.querySelectorAll("[data-label]")) node.title = node.ariaLabel = words()[node.dataset.label];
  tell();
  draw();
}

function tell() {
  const shown = figures && words().figures(figures.tokens, figures.speed.toFixed(1), figures.first.toFixed(2));
  $("figures").textContent = shown ?? "";
  if (online === null) return;
  $("status").textContent = typeof online === "string" ? words()[online] : words().memory(`${(online.memory_bytes / 1e9).toFixed(2)} GB`);
}

async function look() {
  try {
    const response = await fetch("health");
    online = response.ok ? await response.json() : "loading";
  } catch {
    online = "offline";
  }
  if (online.model) $("model").textContent = document.title = online.model;
  tell();
  setTimeout(look, online.model ? LATELY : 1000);
}

function request() {
  const history = messages.slice(0, -1).filter((message) => !message.failed);
  const body = { messages: history.map(({ role, content }) => ({ role, content })) };
  if (settings.system) body.messages.unshift({ role: "system", content: settings.system });
  for (const name of ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"]) {
    if (settings[name] !== "" && settings[name] !== null) body[name] = Number(settings[name]);
  }
  return body;
}

async function answer() {
  const message = { role: "assistant", content: "" };
  messages.push(message);
  const controller = running = new AbortController();
  draw();
  const body = $("log").lastElementChild.firstElementChild;
  const began = performance.now();
  let first = 0;
  try {
    for await (const event of completion(request(), settings.key, controller.signal)) {
      const choice = event.choices[0];
      if (choice?.delta.content) {
        first ||= performance.now();
        message.content += choice.delta.content;
        paint(body, message);
      }
      if (choice?.finish_reason === "length") message.note = "length";
      if (event.usage) figures = measured(event.usage.completion_tokens, began, first || performance.now());
    }
  } catch (error) {
    if (controller.signal.aborted) message.note = "stopped";
    else Object.assign(message, { content: error.message, failed: true });
  }
  running = null;
  keep("messages", messages);
  tell();
  draw();
  $("prompt").focus();
}

function paint(body, message) {
  const log = $("log");
  const following = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  fill(body, message);
  if (following) log.scrollTop = log.scrollHeight;
}

function measured(tokens, began, first) {
  const seconds = (performance.now() - first) / 1000;
  return { tokens, first: (first - began) / 1000, speed: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : 0 };
}

function ask(text) {
  if (running || !text.trim()) return;
  if (messages.at(-1)?.failed) messages.splice(-2);
  messages.push({ role: "user", content: text.trim() });
  keep("messages", messages);
  answer();
}

function regenerate() {
  if (running || messages.at(-1)?.role !== "assistant") return;
  messages.pop();
  answer();
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  ask($("prompt").value);
  if (running) $("prompt").value = "";
  $("prompt").dispatchEvent(new Event("input"));
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { // an input method's Enter chooses a word
    event.preventDefault();
    $("form").requestSubmit();
  }
};
$("prompt").oninput = () => {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
};
$("stop").onclick = () => running?.abort();
$("fresh").onclick = () => {
  running?.abort();
  messages = [];
  figures = null;
  keep("messages", messages);
  tell();
  draw();
};
$("language").onclick = () => {
  keep("language", language = language === "zh" ? "en" : "zh");
  speak();
};
$("theme").onclick = () => {
  keep("theme", theme = theme === "dark" ? "light" : "dark");
  speak();
};
$("open-settings").onclick = () => $("settings").showModal();
for (const name of Object.keys(DEFAULTS)) {
  $(name).value = settings[name];
  $(name).onchange = () => {
    if (!$(name).checkValidity()) $(name).value = DEFAULTS[name];
    settings[name] = $(name).value;
    keep("settings", settings);
  };
}
speak();
look();
