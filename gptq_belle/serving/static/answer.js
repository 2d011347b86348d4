// Generate an answer to a question, and keep whatever arrives.
import { append, path, request, show } from "./conversation.js";
import { sampling, settings, systemPrompt } from "./settings.js";
import { changed, save, state } from "./state.js";
import { completion } from "./stream.js";

const SAVE_EVERY = 500; // milliseconds

/** Ask a question after the last message that is shown. */
export function ask(text) {
  const { chat } = state;
  answer(chat, append(chat, chat.leaf, "user", text));
}

/** Ask a question again in other words; the old one and its answers stay as an alternative. */
export function askInstead(place, text) {
  const { chat } = state;
  answer(chat, append(chat, chat.messages[place].parent, "user", text));
}

/** Answer the last question of the shown path once more; answers that exist stay as alternatives. */
export function answerAgain() {
  const { chat } = state;
  answer(chat, path(chat).findLast((place) => chat.messages[place].role === "user"));
}

async function answer(chat, question) {
  if (state.running) return;
  const controller = new AbortController();
  const before = chat.leaf;
  const run = { chat, question, place: -1, note: undefined, began: performance.now(), first: 0, last: 0, tokens: 0,
    saved: 0, stop: () => controller.abort() };
  state.running = run;
  chat.leaf = question;
  delete chat.messages[question].failure;
  save(chat);
  changed("chat", "chats", "run");
  try {
    const body = { messages: request(chat, question, systemPrompt()), ...sampling() };
    for await (const event of completion(body, settings.key, controller.signal)) take(run, event);
    end(run, run.place < 0 ? { code: "empty" } : run.note && { code: run.note });
  } catch (error) {
    end(run, controller.signal.aborted ? { code: run.left ? "interrupted" : "stopped" }
      : { code: error.code ?? "server", detail: error.detail });
  }
  if (run.place < 0 && before !== question) show(chat, before); // an earlier answer stays if there is no new one
  state.running = null;
  if (state.chats.has(chat.id)) save(chat);
  changed("chat", "chats", "run");
}

/** Stop an answer because the page ends, and keep what has arrived. */
export function leave(run) {
  run.left = true;
  run.stop();
  if (state.chats.has(run.chat.id)) save(run.chat);
}

function take(run, { choices, usage }) {
  const [choice] = choices;
  if (choice?.delta.content) {
    run.last = performance.now();
    run.first ||= run.last;
    run.tokens += 1;
    add(run, choice.delta.content);
  }
  if (choice?.finish_reason === "length") run.note = "length";
  if (usage) run.tokens = usage.completion_tokens;
}

function add(run, piece) {
  const { chat } = run;
  if (run.place < 0) {
    run.place = append(chat, run.question, "assistant", piece);
    chat.messages[run.place].failure = { code: "interrupted" }; // holds if the page ends before the answer does
    changed("chat");
  } else {
    chat.messages[run.place].content += piece;
    changed("piece");
  }
  if (performance.now() - run.saved > SAVE_EVERY && state.chats.has(chat.id)) {
    save(chat);
    run.saved = performance.now();
  }
}

function end(run, failure) {
  const message = run.chat.messages[run.place < 0 ? run.question : run.place];
  if (failure) message.failure = failure;
  else delete message.failure;
  if (run.place >= 0) message.figures = figures(run);
}

/** Tokens, tokens per second after the first one, and seconds until the first one. While an answer is generated, a
 * token is counted for each piece of text. */
export function figures(run) {
  const seconds = (run.last - run.first) / 1000;
  return { tokens: run.tokens, speed: run.tokens > 1 && seconds > 0 ? (run.tokens - 1) / seconds : 0,
    first: (run.first - run.began) / 1000 };
}
