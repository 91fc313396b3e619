// Models with who holds their layers, requests with their chains, nodes.
import { bytes, colour, layers, make, plural, show, styled } from "./make.js";
import { state } from "./picture.js";

export function models(element, mesh) {
  if (!mesh.models.length) {
    show(element, make("p", { class: "faint" }, "None yet. Publish one with: ", make("code", {}, "shoal add DIRECTORY --name NAME")));
    return;
  }
  show(element, mesh.models.map((model) => one(model, mesh)));
}

function one(model, mesh) {
  const hosts = mesh.nodes.flatMap((node) => node.spans.filter((span) => span.manifest === model.manifest)
    .map((span) => ({ node, span }))).sort((a, b) => a.span.start - b.span.start);
  const queue = model.running || model.waiting ? `${model.running} running, ${model.waiting} waiting` : "";
  const tuned = mesh.adapters.filter((adapter) => adapter.base === model.name).map((adapter) => adapter.name);
  return make("div", { class: "model" },
    make("div", { class: "model-head" },
      make("h3", {}, model.name),
      make("span", { class: model.ready ? "good" : "warn" }, model.ready ? "ready" : model.detail || "not ready"),
      make("span", { class: "faint" }, `${plural(model.layers, "layer")}, ${model.dtype}${model.quant === "none" ? "" : `, ${model.quant}`}, ` +
        `${plural(model.copies_min, "copy", "copies")} of ${model.copies_wanted}`),
      queue && make("span", {}, queue)),
    model.shortage && model.ready ? make("div", { class: "warn" }, model.shortage) : null,
    tuned.length ? make("div", { class: "faint" }, `adapters: ${tuned.join(", ")}`) : null,
    make("div", { class: "rows" }, hosts.flatMap(({ node, span }) => row(node, span, model, mesh))));
}

function row(node, span, model, mesh) {
  const share = (layer) => `${(100 * layer) / model.layers}%`;
  const done = span.state === "ready" ? 1 : span.progress;
  const piece = styled(make("i"), {
    left: share(span.start), width: share((span.end - span.start) * Math.max(done, 0.03)),
    background: span.state === "failed" ? "var(--bad)" : colour(node.peer, mesh.nodes),
    opacity: span.state === "ready" ? "1" : "0.55",
  });
  const words = { fetching: `${bytes(span.bytes_fetched)} of ${bytes(span.bytes_wanted)}`, loading: "loading", failed: span.detail };
  return [make("span", {}, node.name), make("div", { class: "bar", title: layers(span) }, piece),
    make("span", { class: span.state === "failed" ? "bad" : "faint" }, words[span.state] ?? layers(span))];
}

export function requests(element, mesh) {
  if (!mesh.requests.length) { show(element, make("p", { class: "faint" }, "None at the moment.")); return; }
  const name = (peer) => mesh.nodes.find((node) => node.peer === peer)?.name ?? peer.slice(-6);
  show(element, mesh.requests.map((request) => make("div", { class: "request" },
    make("div", {}, `${request.model}: ${plural(request.tokens, "token")} in ${request.age_s.toFixed(0)} s`,
      make("span", { class: "faint" }, request.priority === "normal" ? "" : ` (${request.priority})`,
        request.reused_tokens ? `, ${request.reused_tokens} of the prompt were cached` : "")),
    make("div", { class: "chain" }, request.chain.map((stage) =>
      styled(make("span", {}, `${name(stage.node)} `, make("span", { class: "faint" }, layers(stage))),
        { "border-left-color": colour(stage.node, mesh.nodes) }))))));
}

const COLUMNS = ["node", "state", "lends", "device", "RTT", "path", "sessions", "cache free", "health"];

export function nodes(element, mesh, paths) {
  show(element, make("table", {},
    make("thead", {}, make("tr", {}, COLUMNS.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, mesh.nodes.map((node) => make("tr", {}, cells(node, paths).map((cell) => make("td", {}, cell)))))));
}

function cells(node, paths) {
  const sum = (field) => node.spans.reduce((total, span) => total + (span[field] ?? 0), 0);
  const health = node.health ? node.health.state : "";
  return [
    make("strong", {}, node.name),
    make("span", { class: node.suspect ? "bad" : node.connected ? "" : "warn" }, state(node)),
    node.serves ? bytes(node.memory_bytes) : "nothing",
    node.device, node.rtt_ms === null ? "" : `${node.rtt_ms.toFixed(1)} ms`, paths.get(node.peer) ?? "",
    node.spans.length ? `${sum("sessions")}` : "", node.spans.length ? plural(sum("kv_tokens_free"), "token") : "", health,
  ];
}
