// The settings dialog: sampling, system prompt and API key. An empty field means the server's default.
import { $ } from "./dom.js";
import { on, words } from "./state.js";
import { keep, kept } from "./store.js";

const SAMPLING = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];
const PRESETS = {
  belle: {},
  greedy: { temperature: 0 },
  varied: { temperature: 0.9, top_p: 0.95, top_k: 0, repetition_penalty: 1.1 },
};
const PRESET_FIELDS = SAMPLING.slice(0, 4);
const EMPTY = Object.fromEntries([...SAMPLING, "system", "key"].map((name) => [name, ""]));
const MARK = "7d1f"; // a system prompt that is looked for in a prompt

export const settings = { ...EMPTY, ...kept("settings", {}) };
let hasSystemPrompt = false;

/** Sampling fields of a request. */
export function sampling() {
  const given = SAMPLING.filter((name) => settings[name] !== "");
  return Object.fromEntries(given.map((name) => [name, Number(settings[name])]));
}

/** The system prompt; empty if the model's prompt format has none. */
export function systemPrompt() {
  return hasSystemPrompt ? settings.system.trim() : "";
}

/** Ask the server whether the model's prompt format has a system prompt, and offer it only then. */
export async function probeSystemPrompt() {
  const messages = [{ role: "system", content: MARK }, { role: "user", content: "?" }];
  try {
    const response = await fetch("apply-template", { method: "POST", body: JSON.stringify({ messages }),
      headers: { "Content-Type": "application/json", ...settings.key && { Authorization: `Bearer ${settings.key}` } } });
    hasSystemPrompt = response.ok && (await response.json()).prompt.includes(MARK);
  } catch {
    hasSystemPrompt = false;
  }
  $("system").closest("label").hidden = !hasSystemPrompt;
}

function fill() {
  const defaults = JSON.parse(document.body.dataset.sampling);
  for (const name of Object.keys(EMPTY)) {
    $(name).value = settings[name];
    if (name in defaults) $(name).placeholder = defaults[name];
  }
  $("preset").value = presetInUse() ?? "own";
}

function presetInUse() {
  return Object.keys(PRESETS).find((preset) => PRESET_FIELDS.every(
    (name) => String(settings[name]) === String(PRESETS[preset][name] ?? "")));
}

$("preset").onchange = () => {
  const preset = PRESETS[$("preset").value];
  if (preset) for (const name of PRESET_FIELDS) settings[name] = String(preset[name] ?? "");
  keep("settings", settings);
  fill();
};
for (const name of Object.keys(EMPTY)) {
  $(name).onchange = () => {
    if (!$(name).checkValidity()) return; // the browser shows why when the dialog is closed
    settings[name] = $(name).value;
    keep("settings", settings);
    $("preset").value = presetInUse() ?? "own";
    if (name === "key") probeSystemPrompt();
  };
}
$("open-settings").onclick = () => {
  fill();
  $("settings").showModal();
};
on("words", () => {
  for (const option of $("preset").options) option.textContent = words().presets[option.value];
});
