// One answer from the server, piece by piece.

/** Why there is no (whole) answer.
 *
 * `code` is a key of the texts in words.js: offline, broken, key, busy, loading, refused or server; `detail` is the
 * server's message, in English.
 */
export class Failure extends Error {
  constructor(code, detail = "") {
    super(detail || code);
    Object.assign(this, { code, detail });
  }
}

const CODES = { 400: "refused", 401: "key", 404: "refused", 413: "refused", 429: "busy", 503: "loading" };

/** Events of a chat completion; throws a Failure, or an AbortError after `signal`. */
export async function* completion(body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers, signal,
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  }).catch((error) => {
    throw signal.aborted ? error : new Failure("offline");
  });
  if (!response.ok) {
    const found = await response.json().catch(() => null);
    throw new Failure(CODES[response.status] ?? "server", found?.error?.message ?? `HTTP ${response.status}`);
  }
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Failure("server", event.error.message);
    yield event;
  }
  throw new Failure("broken"); // the connection ended without the last event
}

async function* events(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw signal.aborted ? error : new Failure("broken");
    });
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
  }
}
