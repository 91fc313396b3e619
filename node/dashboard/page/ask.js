// Requests to this node. A key is asked for when the node wants one, and kept for as long as the tab is open.
const STORE = "shoal-key";
let asking = null;

export class Refused extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

async function send(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(STORE);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.status === 401) { await askKey(); continue; }
    if (response.ok) return response;
    const document = await response.json().catch(() => ({}));
    throw new Refused(document.error?.message ?? `the node answered with status ${response.status}`, response.status);
  }
}

function askKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(STORE, document.getElementById("key").value);
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

export const get = async (path) => (await send(path)).json();

function body(document, signal) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(document), signal };
}

export const post = async (path, document) => (await send(path, body(document))).json();

// The documents of a server-sent event stream, as they come.
export async function* events(path, document, signal) {
  const response = await send(path, body(document, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused("the answer broke off", 200);
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error.message, 200);
      yield event;
    }
  }
}
