// A chat with one of the mesh's models. Enter sends; the time to the first text and the speed stand below each answer.
import { events } from "./ask.js";
import { make } from "./make.js";

const talk = document.getElementById("talk");
const choice = document.getElementById("model");
const message = document.getElementById("message");
const send = document.getElementById("send"), stop = document.getElementById("stop");
let messages = [], running = null;

export function offer(mesh) {
  const names = [...mesh.models.filter((model) => model.ready), ...mesh.adapters].map((model) => model.name);
  if (names.join() !== [...choice.options].map((option) => option.value).join()) {
    const before = choice.value;
    choice.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
    if (names.includes(before)) choice.value = before;
  }
  send.disabled = running !== null || !names.length;
}

async function say(text) {
  messages.push({ role: "user", content: text });
  talk.append(make("p", { class: "mine" }, text));
  const shown = make("p", { class: "theirs" }), speed = make("p", { class: "speed" }, "\u2026");
  talk.append(shown, speed);
  running = new AbortController();
  stop.disabled = false; send.disabled = true;
  let answer = "";
  try {
    answer = await hear(text, shown, speed);
  } catch (problem) {
    speed.textContent = problem.name === "AbortError" ? `stopped after: ${speed.textContent}` : problem.message;
    speed.classList.toggle("bad", problem.name !== "AbortError");
    answer = shown.textContent;
  }
  messages.push({ role: "assistant", content: answer });
  running = null; stop.disabled = true; send.disabled = !choice.options.length;
  message.focus();
}

async function hear(text, shown, speed) {
  const began = performance.now();
  let first = null, tokens = 0;
  const body = { model: choice.value, messages, stream: true, return_token_ids: true };
  for await (const event of events("/v1/chat/completions", body, running.signal)) {
    const piece = event.choices?.[0];
    if (!piece?.delta || !(piece.delta.content || piece.token_ids)) continue;
    const now = performance.now();
    first ??= now - began;
    tokens += piece.token_ids?.length ?? 1;
    shown.textContent += piece.delta.content ?? "";
    const rate = tokens > 1 ? `, ${(((tokens - 1) * 1000) / Math.max(1, now - began - first)).toFixed(1)} tokens/s` : "";
    speed.textContent = `first text after ${Math.round(first)} ms, ${tokens} tokens${rate}`;
    talk.scrollTop = talk.scrollHeight;
  }
  return shown.textContent;
}

function submit() {
  const text = message.value.trim();
  if (!text || running || !choice.value) return;
  message.value = "";
  say(text);
}

document.getElementById("say").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
stop.addEventListener("click", () => running?.abort());
document.getElementById("forget").addEventListener("click", () => {
  running?.abort();
  messages = [];
  talk.replaceChildren();
  message.focus();
});
