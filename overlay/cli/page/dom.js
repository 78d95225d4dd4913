// Elements and texts. What comes over the wire becomes text, never markup.

const SVG = "http://www.w3.org/2000/svg";
const IN_SVG = new Set(["svg", "g", "path", "rect", "circle", "text", "line", "title", "polygon"]);

export const byId = (id) => document.getElementById(id);

// An element with attributes and children; null and false children are left out.
export function el(tag, attributes = {}, ...children) {
  const made = IN_SVG.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  set(made, attributes);
  made.append(...children.flat().filter((child) => child !== null && child !== false));
  return made;
}

export function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) element.removeAttribute(name);
    else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
  }
  return element;
}

export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Makes `parent` hold one child for each item, in order. A child stays the same element while its
// key stays, so that focus, hover and scrolling survive a new snapshot.
export function keep(parent, items, key, make, update) {
  const old = (parent.kept ??= new Map());
  const now = new Map();
  let at = parent.firstChild;
  for (const item of items) {
    const name = String(key(item));
    if (now.has(name)) continue;
    const child = old.get(name) ?? make(item);
    now.set(name, child);
    old.delete(name);
    if (child === at) at = at.nextSibling;
    else parent.insertBefore(child, at);
    update?.(child, item);
  }
  for (const child of old.values()) child.remove();
  parent.kept = now;
}

// The rows of the table in the section with this id.
export const body = (id) => byId(id).querySelector("tbody");

// Fills the cells of a row; a value is a text or [text, class], or null to leave the cell alone.
export function fill(row, values) {
  values.forEach((value, i) => {
    if (value === null) return;
    const [text, extra] = Array.isArray(value) ? value : [value, null];
    const cell = row.children[i];
    say(cell, text);
    cell.classList.toggle("bad", extra === "bad");
  });
}

// A row whose cells have the classes of the table's header.
export function rowOf(id) {
  const heads = byId(id).querySelectorAll("th");
  return el("tr", {}, [...heads].map((head) => el("td", { class: head.className || null })));
}

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

export const count = (n) => (n === undefined || n === null ? "–" : whole.format(n));

export const several = (n, noun) =>
  n === 1 ? `1 ${noun}` : `${count(n)} ${noun}${noun.endsWith("s") ? "es" : "s"}`;

export function rate(n) {
  if (n === undefined || n === null) return "–";
  return n > 0 && n < 9.95 ? n.toFixed(1) : whole.format(n);
}

// Milliseconds with about three digits.
export function ms(n) {
  if (n === undefined || n === null) return "–";
  if (n >= 99.5) return whole.format(n);
  return n >= 9.95 ? n.toFixed(1) : n.toFixed(2);
}

export function span(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}

export function clock(at, withMs = false) {
  const when = new Date(at * 1000);
  const two = (n) => String(n).padStart(2, "0");
  const time = [when.getHours(), when.getMinutes(), when.getSeconds()].map(two).join(":");
  return withMs ? `${time}.${String(when.getMilliseconds()).padStart(3, "0")}` : time;
}

// A state in a word or two.
export function stateOf(process) {
  const words = {
    well: "serves", impaired: "impaired", stopping: "stopping", asking: "being asked",
    gone: `gone ${span(process.for_s)}`, unseen: `not seen from here ${span(process.for_s)}`,
  };
  return words[process.health] ?? process.health;
}

// A team has a colour by its place, or the colour that it is named for.
const NAMED = { green: 0, pink: 1, blue: 2, yellow: 3, orange: 3, purple: 4, violet: 4, teal: 5, brown: 6, gray: 7, grey: 7 };

export function teamColours(processes) {
  const colours = new Map();
  let next = 0;
  for (const { team } of processes) {
    if (colours.has(team)) continue;
    const taken = new Set(colours.values());
    let colour = NAMED[team.toLowerCase()];
    if (colour === undefined) {
      while (taken.has(next % 8) && taken.size < 8) next += 1;
      colour = next++ % 8;
    }
    colours.set(team, colour);
  }
  return colours;
}

export const fullness = (used, of) =>
  !of || used < of * 0.8 ? "" : used < of ? "is-high" : "is-full";
