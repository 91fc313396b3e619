// Asks the node each second what it sees, and hands it to the parts of the page. A hidden page asks nothing.
import { examine, paths } from "./advice.js";
import { get, Refused } from "./ask.js";
import { offer } from "./chat.js";
import { models, nodes, requests } from "./lists.js";
import { plural } from "./make.js";
import { picture } from "./picture.js";

const LOOK_MS = 1000, EXAMINE_MS = 30000;
const by = (id) => document.getElementById(id);
let examined = 0;

function showMesh(mesh) {
  const alive = mesh.nodes.filter((node) => !node.suspect).length;
  const ready = mesh.models.filter((model) => model.ready).length;
  by("summary").textContent = `${plural(alive, "node")}, ${ready} of ${plural(mesh.models.length, "model")} ready, ` +
    `${plural(mesh.requests.length, "request")} here. Mesh ${mesh.mesh.slice(0, 8)}`;
  picture(by("picture"), mesh, paths);
  models(by("models"), mesh);
  requests(by("requests"), mesh);
  nodes(by("nodes"), mesh, paths);
  offer(mesh);
}

async function look() {
  try {
    showMesh(await get("/mesh"));
    by("offline").hidden = true;
    if (performance.now() - examined > EXAMINE_MS || !examined) {
      examined = performance.now();
      await examine();
    }
  } catch (problem) {
    by("offline").hidden = false;
    by("offline").textContent = problem instanceof Refused ? problem.message : "This node does not answer. Is it running?";
  }
}

async function run() {
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
  }
}

run();
