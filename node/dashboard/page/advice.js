// What the doctor found, how each member is reached, and where the layers of a model would go.
import { post, Refused } from "./ask.js";
import { bytes, layers, make, plural, show } from "./make.js";

const findings = document.getElementById("findings");
const plan = document.getElementById("plan");
export const paths = new Map();

export async function examine() {
  try {
    const found = await post("/shoal/doctor", {});
    paths.clear();
    for (const peer of found.peers) paths.set(peer.peer, peer.path);
    show(findings, found.findings.length ? make("ul", {}, found.findings.map(finding)) : make("p", { class: "good" }, "Nothing is wrong."),
      make("p", { class: "faint" }, `Reachable: ${found.reachability}. Router: ${found.nat}.`));
  } catch (problem) {
    if (!(problem instanceof Refused)) throw problem;
    show(findings, make("p", { class: "faint" }, `Only on the node's own computer: ${problem.message}`));
  }
}

function finding(one) {
  return make("li", { class: one.level }, make("strong", {}, one.what), one.next_step ? make("div", {}, one.next_step) : null);
}

async function preview(model, copies) {
  show(plan, make("p", { class: "faint" }, "Planning\u2026"));
  try {
    const found = await post("/shoal/plan", { model, copies });
    const best = found.replicas[0];
    show(plan,
      found.shortage ? make("p", { class: "warn" }, found.shortage) : null,
      make("p", {}, `${plural(found.layers, "layer")}, ${bytes(found.weight_bytes)} of weights`,
        best ? `; about ${best.ms_per_token.toFixed(0)} ms a token, ${best.tokens_per_s.toFixed(0)} tokens/s for all together` : ""),
      make("table", {}, make("tbody", {}, found.spans.map((span) => make("tr", {},
        make("td", {}, make("strong", {}, span.name)), make("td", {}, layers(span)), make("td", {}, bytes(span.memory_bytes)),
        make("td", { class: "faint" }, span.fetch_bytes ? `${bytes(span.fetch_bytes)} to fetch` : "there already"))))));
  } catch (problem) {
    if (!(problem instanceof Refused)) throw problem;
    show(plan, make("p", { class: "bad" }, problem.message));
  }
}

document.getElementById("examine").addEventListener("click", examine);
document.getElementById("preview").addEventListener("submit", (event) => {
  event.preventDefault();
  const model = document.getElementById("preview-model").value.trim();
  if (model) preview(model, Number(document.getElementById("preview-copies").value) || 1);
});
