// The mesh as a drawing: this node's ring of members, how it reaches them, and answers on their way around.
import { bytes, colour, draw, layers, make, show } from "./make.js";

const WIDTH = 640, HEIGHT = 380, RING_X = 215, RING_Y = 125, SIZE = 24;

export function picture(element, mesh, paths) {
  const at = places([...mesh.nodes.filter((node) => node.self), ...mesh.nodes.filter((node) => !node.self)]);
  const self = mesh.nodes.find((node) => node.self);
  const links = mesh.nodes.filter((node) => self && !node.self && node.connected)
    .map((node) => link(at.get(self.peer), at.get(node.peer), node, paths.get(node.peer)));
  const flows = mesh.requests.flatMap((request) => [request.chain, request.prefill_chain ?? []])
    .filter((chain) => chain.length).map((chain) => flow(chain, at));
  const nodes = mesh.nodes.map((node) => circle(node, at.get(node.peer), mesh));
  const words = mesh.nodes.map((node) => `${node.name}: ${state(node)}`).join("; ");
  show(element, draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `The mesh. ${words}` },
    links, flows, nodes),
    make("p", { class: "legend" }, "Lines from this node: solid is direct, dashed hole-punched, dotted relayed. Moving dots are answers on their way."));
}

export function state(node) {
  if (node.suspect) return "not heard of";
  if (node.self) return "this node";
  return node.connected ? "connected" : "known, not connected";
}

function places(nodes) {
  const found = new Map();
  nodes.forEach((node, index) => {
    const angle = (2 * Math.PI * index) / nodes.length - Math.PI / 2;
    const alone = nodes.length === 1 ? 0 : 1;
    found.set(node.peer, {
      x: WIDTH / 2 + alone * RING_X * Math.cos(angle), y: HEIGHT / 2 - 8 + alone * RING_Y * Math.sin(angle),
    });
  });
  return found;
}

function link(from, to, node, path) {
  const kind = path === "relayed" ? "relayed" : path === "hole-punched" ? "punched" : "direct";
  const x = from.x + 0.62 * (to.x - from.x), y = from.y + 0.62 * (to.y - from.y);
  const rtt = node.rtt_ms === null ? "" : `${node.rtt_ms < 10 ? node.rtt_ms.toFixed(1) : Math.round(node.rtt_ms)} ms`;
  return draw("g", {},
    draw("title", {}, `${path ?? "connected"}${rtt ? `, ${rtt}` : ""}`),
    draw("line", { class: `link ${kind}`, x1: from.x, y1: from.y, x2: to.x, y2: to.y }),
    draw("text", { class: "small", x, y: y - 4, "text-anchor": "middle" }, rtt));
}

function flow(chain, at) {
  const points = chain.map((stage) => at.get(stage.node)).filter(Boolean);
  const ring = points.length > 1 ? [...points, points[0]] : points;
  return draw("polyline", { class: "flow", points: ring.map((point) => `${point.x},${point.y}`).join(" ") });
}

function circle(node, point, mesh) {
  const hue = colour(node.peer, mesh.nodes);
  const held = node.spans.filter((span) => span.state === "ready");
  const speed = node.spans.reduce((sum, span) => sum + (span.tokens_per_s ?? 0), 0);
  const what = held.length ? held.map((span) => layers(span)).slice(0, 2).join(", ") : node.serves ? "no layers" : "only asks";
  return draw("g", { class: node.suspect || !node.connected ? "away" : null },
    draw("title", {}, `${node.name}: ${state(node)}, lends ${bytes(node.memory_bytes)}`),
    draw("circle", { cx: point.x, cy: point.y, r: SIZE, fill: hue, stroke: "currentColor", "stroke-width": node.self ? 3 : 0 }),
    draw("text", { x: point.x, y: point.y + SIZE + 15, "text-anchor": "middle" }, node.name),
    draw("text", { class: "small", x: point.x, y: point.y + SIZE + 29, "text-anchor": "middle" },
      speed >= 0.1 ? `${what}, ${speed.toFixed(1)} tokens/s` : what));
}
