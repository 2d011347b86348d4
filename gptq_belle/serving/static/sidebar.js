// The list of conversations; they are kept in this browser only, and can be exported and imported as a file.
import { newConversation } from "./conversation.js";
import { $, button, element } from "./dom.js";
import { changed, on, open, remove, save, state, words } from "./state.js";
import { exported, imported, keep, kept, onOtherTab } from "./store.js";

const NARROW = matchMedia("(max-width: 52rem)"); // there the list covers the conversation, as in chat.css

function setOpen(isOpen) {
  document.body.classList.toggle("with-sidebar", isOpen);
  $("sidebar").inert = !isOpen;
  $("toggle-sidebar").ariaExpanded = String(isOpen);
  if (!NARROW.matches) keep("sidebar", isOpen);
}

function select(chat) {
  open(chat);
  if (NARROW.matches) setOpen(false);
  $("prompt").focus();
}

function draw() {
  const chats = [...state.chats.values()].sort((one, other) => other.updated - one.updated);
  const focused = document.activeElement.dataset.chat;
  $("chats").replaceChildren(...chats.map(item));
  if (focused) $("chats").querySelector(`[data-chat="${focused}"]`)?.focus();
}

function item(chat) {
  const title = chat.title || chat.draft.trim().slice(0, 40) || words().untitled;
  const isRunning = state.running?.chat === chat;
  const entry = button(isRunning ? `${title} …` : title, () => select(chat), { className: "entry", title,
    "data-chat": chat.id });
  if (chat === state.chat) entry.setAttribute("aria-current", "true");
  const away = button("×", () => {
    if (!confirm(words().confirm_delete(title))) return;
    remove(chat);
    $("fresh").focus();
  }, { title: words().delete, "aria-label": `${words().delete}: ${title}` });
  return element("li", {}, entry, away);
}

function download() {
  const address = URL.createObjectURL(new Blob([exported(state.chats.values())], { type: "application/json" }));
  element("a", { href: address, download: `gptq_belle-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

async function upload() {
  const [file] = $("file").files;
  const chats = file && imported(await file.text());
  $("file").value = "";
  if (!chats) {
    alert(words().not_imported);
    return;
  }
  for (const chat of chats) adopt(chat);
  changed("chats");
}

/** Add a conversation; one that differs from the one of its id here is added under another id. */
function adopt(chat) {
  const here = state.chats.get(chat.id);
  if (here && JSON.stringify(here.messages) === JSON.stringify(chat.messages)) return;
  save({ ...chat, draft: String(chat.draft ?? ""), id: here ? newConversation().id : chat.id });
}

$("fresh").onclick = () => select(newConversation());
$("export").onclick = download;
$("import").onclick = () => $("file").click();
$("file").onchange = upload;
$("toggle-sidebar").onclick = () => {
  setOpen(!document.body.classList.contains("with-sidebar"));
  if (NARROW.matches && !$("sidebar").inert) $("fresh").focus();
};
$("curtain").onclick = () => setOpen(false);
$("sidebar").onkeydown = (event) => {
  if (event.key !== "Escape" || !NARROW.matches) return;
  setOpen(false);
  $("toggle-sidebar").focus();
};
NARROW.onchange = () => setOpen(!NARROW.matches && kept("sidebar", true));
setOpen(!NARROW.matches && kept("sidebar", true));
on("chats words run", draw);
onOtherTab((chat, id) => {
  if (state.running?.chat.id === id) return;
  if (chat) state.chats.set(id, chat);
  else state.chats.delete(id);
  if (chat && state.chat.id === id) {
    chat.draft = state.chat.draft; // what is being typed here
    state.chat = chat;
    changed("chat");
  }
  changed("chats");
});
