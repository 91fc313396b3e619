// Elements, and numbers in words. Text is always set as text: names come from other people's computers.
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#0b84a5", "#e07b39", "#6a994e", "#a44a9c", "#c9a227", "#4668c5", "#d1495b", "#2a9d8f"];

export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Styles are set by script, one by one: the page's policy allows none in attributes.
export function styled(element, styles) {
  for (const [name, value] of Object.entries(styles)) element.style.setProperty(name, value);
  return element;
}

// Replaces what an element holds only where it differs, so that a selection or the focus in it stays.
export function show(element, ...children) {
  const fresh = make("div", {}, ...children);
  if (fresh.innerHTML !== element.innerHTML) element.replaceChildren(...fresh.childNodes);
}

export function colour(peer, nodes) {
  const at = nodes.findIndex((node) => node.peer === peer);
  return COLOURS[(at < 0 ? 0 : at) % COLOURS.length];
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 999.5 && unit < units.length - 1) { count /= 1000; unit += 1; }
  return `${count >= 99.5 || unit === 0 ? count.toFixed(0) : count.toPrecision(2)} ${units[unit]}`;
}

export function layers(span) {
  const last = span.end - 1;
  return span.start === last ? `layer ${last}` : `layers ${span.start}\u2013${last}`;
}

export function plural(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}
