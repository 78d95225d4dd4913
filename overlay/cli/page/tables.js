// The figures on top, the tables, and the details of the selected process.

import { body, byId, clock, count, el, fill, fullness, keep, ms, rate, rowOf, say, set, several, span, stateOf } from "./dom.js";
import { sparkline } from "./charts.js";

const CODES = [
  "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
  "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE",
  "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
];
const HOPS_SHOWN = 9;

const marked = (health) => el("span", { class: `mark ${health}`, "aria-hidden": "true" });

// Whether the overlay is open, and what is wrong with its certificates: a line each.
export function showSecurity({ mode, text, problems }) {
  const lines = [{ text, class: mode === "open" ? "warning" : "quiet" }, ...problems.map((problem) => ({ text: problem, class: "warning" }))];
  const shown = lines.filter((line) => line.text);
  keep(byId("security"), shown, (line) => line.text, (line) => el("p", { class: line.class }, line.text));
  byId("security").hidden = !shown.length;
}

export function showFigures(process, snapshot) {
  const last = (name) => {
    const series = snapshot.course[name] ?? [];
    return series[series.length - 1];
  };
  const refused = process ? (process.rates.refused ?? 0) : undefined;
  const of = (n) => ({ text: ` of ${count(n)}` });
  const streamed = process ? process.waiting - process.queued : 0;
  const figures = [
    ["answers", rate(process?.rates?.completed), { text: " /s" }],
    ["waiting in the queue", count(process?.queued), of(process?.queue_slots), [process?.queued, process?.queue_slots]],
    ["waiting in streams", count(process && streamed), null],
    ["in service", count(process?.in_service), null],
    ["p50, p99", last("p50_ms") === undefined || last("p50_ms") === null ? "–" : `${ms(last("p50_ms"))} · ${ms(last("p99_ms"))}`, { text: " ms" }],
    ["refused", rate(refused), { text: " /s" }],
    ["workers", count(snapshot.workers_ready), of(snapshot.workers)],
  ];
  keep(byId("figures"), figures, ([name]) => name,
    ([name]) => el("div", {}, el("dt", {}, name), el("dd", {}, el("span"), el("span", { class: "unit" }))),
    (box, [name, text, unit, bar]) => {
      say(box.querySelector("dd span"), text);
      say(box.querySelector(".unit"), unit?.text ?? "");
      box.classList.toggle("is-bad", (name === "refused" && refused > 0) || (name === "workers" && snapshot.workers_ready < snapshot.workers));
      if (bar) {
        const [used, slots] = [bar[0] ?? 0, bar[1] ?? 0];
        const shown = box.querySelector(".bar") ?? box.appendChild(el("span", { class: "bar" }, el("i")));
        set(shown, { class: `bar ${fullness(used, slots)}` });
        shown.firstChild.style.width = slots ? `${Math.min(100, (100 * used) / slots)}%` : "0";
      }
    });
}

export function showProcesses(snapshot, colours, picked, pick) {
  keep(body("processes"), snapshot.processes, (p) => p.id, (p) => {
    const row = rowOf("processes");
    const button = el("button", { type: "button" });
    button.addEventListener("click", () => pick(p.id));
    row.firstChild.append(el("span", { class: "team" }), button);
    row.children[1].append(el("span"), el("span"));
    row.lastChild.append(el("svg", { class: "spark", "aria-hidden": "true", viewBox: "0 0 66 16" }));
    return row;
  }, (row, p) => {
    const isThere = ["well", "impaired", "stopping"].includes(p.health);
    const now = (value) => (isThere ? value : "–");
    const took = p.totals?.received ? p.service_ms : {};
    set(row, { class: `${p.id === picked ? "is-picked" : ""}${isThere ? "" : " is-off"}` });
    set(row.querySelector(".team"), { class: `team team-${colours.get(p.team)}` });
    const button = row.querySelector("button");
    say(button, p.id);
    set(button, { "aria-pressed": p.id === picked, title: p.id });
    const [sign, words] = row.children[1].children;
    set(sign, { class: `mark ${p.health}`, "aria-hidden": "true" });
    set(words, { class: `text-${p.health}`, title: p.why || null });
    say(words, stateOf(p));
    const busy = p.slots && p.rank < 2 ? ` of ${count(p.slots)}` : "";
    fill(row, [
      null, null, p.team, p.host, now(rate(p.rates.completed)), now(count(p.waiting)),
      now(`${count(p.in_service)}${busy}`), now(ms(took.p50)), now(ms(took.p99)),
      now(typeof p.cores === "number" ? count(100 * p.cores) : "–"), now(count(p.memory_mib)),
      [count(p.totals?.failed), p.rates.failed > 0 && "bad"],
      [count(p.totals?.refused), p.rates.refused > 0 && "bad"], null,
    ]);
    sparkline(row.querySelector(".spark"), p.course.completed, 60);
  });
}

export function showHandlers(snapshot) {
  const found = new Map();
  for (const process of snapshot.processes) {
    if (!["well", "impaired", "stopping"].includes(process.health)) continue;
    for (const handler of process.handlers ?? []) {
      const sum = found.get(handler.name) ?? { ...handler, workers: 0, running: 0, room: 0, rate: 0, completed: 0, failed: 0, p50: [], p99: [] };
      sum.workers += 1;
      sum.running += handler.active;
      sum.room += handler.slots;
      for (const name of ["rate", "completed", "failed"]) sum[name] += handler[name];
      if (handler.completed + handler.failed) {
        sum.p50.push(handler.worked_ms.p50);
        sum.p99.push(handler.worked_ms.p99);
      }
      found.set(handler.name, sum);
    }
  }
  const between = (values) => {
    if (!values.length) return "–";
    const [least, most] = [ms(Math.min(...values)), ms(Math.max(...values))];
    return least === most ? least : `${least}–${most}`;
  };
  const described = (h) => snapshot.functions.filter((f) => f.name === h.name).map((f) => ({ h, f }));
  const rows = [...found.values()].flatMap((h) => [{ h }, ...described(h)]);
  keep(body("handlers"), rows, ({ h, f }) => (f ? `${h.name} ${f.signature} ${f.doc}` : h.name), ({ f }) => {
    if (!f) return rowOf("handlers");
    return el("tr", { class: "function" }, el("td", { colspan: 10, class: "text" },
      el("details", {}, el("summary", {}, el("code", {}, f.signature || f.name)),
        el("p", { class: "doc" }, f.doc || "It has no docstring."), el("p", { class: "quiet" }))));
  }, (row, { h, f }) => {
    if (f) return say(row.querySelector(".quiet"), `on ${f.workers.join(", ")}`);
    fill(row, [
      h.name, h.run === "process" ? "processes" : "threads", count(h.workers), count(h.running), count(h.room),
      rate(h.rate), between(h.p50), between(h.p99), count(h.completed), [count(h.failed), h.failed > 0 && "bad"],
    ]);
  });
}

export function showMaps(snapshot) {
  keep(body("maps"), snapshot.maps, (m) => `${m.caller} ${m.number} ${m.handler}`, () => {
    const row = rowOf("maps");
    row.children[2].append(el("progress", { max: 1 }));
    return row;
  }, (row, m) => {
    const bar = row.querySelector("progress");
    if (m.total) set(bar, { value: (m.answered + m.failed) / m.total });
    else set(bar, { value: null });
    fill(row, [
      m.handler || "default", m.silent_s > 5 ? `${m.caller}, silent for ${span(m.silent_s)}` : m.caller, null,
      count(m.answered), [count(m.failed), m.failed > 0 && "bad"], count(m.total), rate(m.rate), m.left_s === null ? "–" : span(m.left_s),
    ]);
  });
  byId("maps").classList.toggle("is-empty", !snapshot.maps.length);
}

export function showLanes(snapshot) {
  keep(body("lanes"), snapshot.lanes, (l) => `${l.caller} ${l.worker} ${l.handler}`, () => rowOf("lanes"), (row, l) => {
    fill(row, [l.worker, l.handler || "default", l.caller, count(l.unanswered), count(l.rows), count(l.answered), span(l.since_s)]);
  });
  byId("lanes").classList.toggle("is-empty", !snapshot.lanes.length);
}

const opened = new Map();
let held = [];

// The list stands still while it is being read, and what was opened stays in it.
export function showRequests(snapshot, address, again) {
  const isHeld = byId("requests").matches(":hover, :has(:focus-visible)");
  if (!isHeld) held = [...snapshot.requests].reverse();
  say(byId("held"), isHeld && held.length ? "held while you point at it" : "");
  const wanted = held.filter(isWanted);
  const shown = new Set(wanted.map(keyOf));
  const requests = [...[...opened.values()].filter((r) => isWanted(r) && !shown.has(keyOf(r))), ...wanted];
  const others = held.length - wanted.length;
  say(byId("hidden-requests"), others ? `${count(others)} of the last ${count(held.length)} are not shown` : "");
  const rows = requests.flatMap((r) => (opened.has(keyOf(r)) ? [{ r }, { r, isWay: true }] : [{ r }]));
  keep(body("requests"), rows, ({ r, isWay }) => keyOf(r) + (isWay ? " way" : ""), ({ r, isWay }) => {
    if (isWay) return el("tr", {}, el("td", { colspan: 7, class: "text" }, wayOf(r, address)));
    const row = rowOf("requests");
    row.children[4].classList.add("text", "status");
    const code = CODES[r.code] ?? String(r.code);
    row.children[4].append(code, el("span", { class: "wide" }, r.reason ? `: ${r.reason}` : ""));
    row.children[4].classList.toggle("bad", r.code !== 0);
    row.children[6].append(pathOf(r));
    row.children[6].classList.add("text");
    const button = el("button", { type: "button", class: "id", title: "its way" }, r.request_id);
    button.addEventListener("click", () => {
      if (!opened.delete(keyOf(r))) opened.set(keyOf(r), r);
      again();
    });
    row.children[1].append(button);
    return row;
  }, (row, { r, isWay }) => {
    if (isWay) return;
    set(row.querySelector("button"), { "aria-expanded": opened.has(keyOf(r)) });
    const many = r.count > 1 ? ` ×${count(r.count)}` : "";
    fill(row, [
      clock(r.ended_at, true), null, `${r.mode} ${r.handler || "default"}${r.team ? ` of ${r.team}` : ""}${many}`,
      r.caller, null, ms(r.total_ms), null,
    ]);
  });
  byId("requests").classList.toggle("is-empty", !held.length && !requests.length);
  say(byId("send-one"), `python client.py ${hostAndPort(address)}`);
}

// Whether the form above the list asks for this request.
function isWanted(r) {
  const { text, failed } = byId("wanted").elements;
  const part = text.value.trim().toLowerCase();
  const found = [r.handler || "default", r.caller, r.request_id].some((name) => name.toLowerCase().includes(part));
  return found && (!failed.checked || r.code !== 0);
}

const hostAndPort = (address) => address.replace(/:(\d+)$/, " $1").replace(/[[\]]/g, "");

const keyOf = (r) => `${r.request_id} ${r.ended_at}`;

// A  › B › C 3.1 · D 2.9 › E …: each process once, with its time in milliseconds.
function pathOf(r) {
  const path = el("span", { class: "path" });
  r.hops.slice(0, HOPS_SHOWN).forEach((hop, i) => {
    if (i) path.append(hop.depth > r.hops[i - 1].depth ? " › " : "  · ");
    path.append(el("b", {}, hop.id));
    if (hop.waited_ms + hop.worked_ms > 0) path.append(` ${ms(hop.waited_ms + hop.worked_ms)}`);
  });
  if (r.hops.length > HOPS_SHOWN) path.append(`  and ${r.hops.length - HOPS_SHOWN} more`);
  return path;
}

function wayOf(r, address) {
  const way = el("div", { class: "way" });
  const heads = ["process", "on the way", "waited", "worked", `of ${ms(r.total_ms)} ms`];
  way.append(...heads.map((head) => el("span", { class: "head" }, head)));
  const part = (value) => `${Math.min(100, (100 * value) / Math.max(r.total_ms, 0.001))}%`;
  for (const hop of r.hops) {
    const parts = [Math.max(0, hop.away_ms - hop.waited_ms - hop.worked_ms), hop.waited_ms, hop.worked_ms];
    const spent = el("span", { class: "spent" }, ["away", "waited", "worked"].map((name) => el("i", { class: name })));
    parts.forEach((value, i) => { spent.children[i].style.width = part(value); });
    const failed = hop.code ? ` ${CODES[hop.code] ?? hop.code}` : "";
    way.append(
      el("b", { class: `depth-${Math.min(4, hop.depth)}` }, hop.id + failed),
      ...parts.map((value, i) => el("span", { class: "n" }, i === 0 && !hop.away_ms ? "–" : `${ms(value)} ms`)), spent,
    );
  }
  const logs = el("code", {}, `python client.py ${hostAndPort(address)} logs --request ${r.request_id}`);
  return [el("div", {}, r.reason), way, el("div", { class: "quiet" }, "its log lines: ", logs)];
}

export function showEvents(snapshot) {
  const events = [...snapshot.events].reverse();
  const level = { info: "well", warning: "impaired", error: "gone" };
  const keyOf = (e) => (e.is_change ? `${e.process} ${e.at} ${e.number ?? e.kind}` : `${e.process} ${e.kind} ${e.first_at}`);
  keep(body("events"), events, keyOf, (e) => el("tr", { class: e.is_change ? "is-change" : null },
    el("td", { class: "quiet" }), el("td", {}, marked(level[e.level] ?? "well"), el("b", {}, e.process)),
    el("td", { class: "text" })), (row, e) => {
    say(row.firstChild, clock(e.at));
    say(row.lastChild, e.count > 1 ? `${e.text} (${count(e.count)} times since ${clock(e.first_at)})` : e.text);
  });
  byId("events").classList.toggle("is-empty", !events.length);
}

export function showDetails(snapshot, process) {
  if (!process) return;
  keep(byId("details-title"), ["mark", "text"], (name) => name, () => el("span"), (part, name) => {
    if (name === "mark") set(part, { class: `mark ${process.health}`, "aria-hidden": "true" });
    else say(part, `${process.id}, ${process.role.replace("_", " ")} of team ${process.team}: ${stateOf(process)}`);
  });
  const t = process.totals;
  const refusals = Object.entries(process.refused_by_reason ?? {}).map(([why, n]) => `${count(n)} ${why}`).join(", ");
  const spread = (s) => (s ? `p50 ${ms(s.p50)}, p99 ${ms(s.p99)}, mean ${ms(s.mean)} ms` : "");
  const facts = [
    ["why", process.why],
    ["address", process.address],
    ["requests", t && `${count(t.received)}: ${count(t.completed)} answered, ${count(t.failed)} failed, ${count(t.refused)} refused, ${count(t.cancelled)} cancelled`],
    ["refused", refusals],
    ["in service", t && `${count(process.in_service)}, at most ${count(process.capacity)} single requests; ${count(process.slots)} handlers can run here or below`],
    ["queue", t && `${count(process.queued)} of ${count(process.queue_slots)}; ${count(process.waiting - process.queued)} more in ${several(process.streams, "stream")}`],
    ["waited", t?.received > 0 && spread(process.waiting_ms)],
    ["served in", t?.received > 0 && spread(process.service_ms)],
    ["handlers", (process.handlers ?? []).map((h) => `${h.name} ${count(h.active)} of ${count(h.slots)}`).join(", ")],
    ["program", process.pid && `overlay ${process.version}, Python ${process.python}, ${process.platform}, pid ${process.pid}, up ${span(process.uptime_s)}`],
    ["uses", process.pid && `${typeof process.cores === "number" ? `${count(100 * process.cores)} % of a core, ` : ""}${count(process.memory_mib)} MiB, with the processes of its handlers`],
    ["configuration", process.config],
  ].filter(([, value]) => value);
  const parts = [{ key: "facts" }, { key: "links" }];
  keep(byId("details-body"), parts, ({ key }) => key, ({ key }) => (key === "facts" ? el("dl") : linkTable()), (part, { key }) => {
    if (key === "links") return showLinks(part, snapshot, process.id);
    return keep(part, facts.flatMap(([name, value]) => [[name, "dt", name], [name, "dd", value]]),
      ([name, tag]) => name + tag, ([, tag]) => el(tag), (shown, [name, tag, text]) => {
        say(shown, text);
        if (name === "why" && tag === "dd") set(shown, { class: `text-${process.health}` });
      });
  });
}

function linkTable() {
  const heads = [["link", ""], ["state", ""], ["asked/s", "n"], ["round trip ms", "n"], ["open", "n"], ["failed", "n wide"]];
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, heads.map(([name, kind]) => el("th", { scope: "col", class: kind || null }, name)))), el("tbody")));
}

function showLinks(part, snapshot, id) {
  const links = snapshot.links.filter((l) => l.from === id || l.to === id);
  part.hidden = !links.length;
  keep(part.querySelector("tbody"), links, (l) => `${l.from}>${l.to}`, () => el("tr", {},
    el("td"), el("td", { class: "text" }), el("td", { class: "n" }), el("td", { class: "n" }), el("td", { class: "n" }), el("td", { class: "n wide" })), (row, l) => {
    const health = l.state === "up" && l.health !== "healthy" ? l.health : l.state;
    const state = health === "up" ? `up ${span(l.for_s)}` : `${health} ${span(l.for_s)}${l.why ? `: ${l.why}` : ""}`;
    fill(row, [`${l.from} → ${l.to}`, [state, l.state === "down" && "bad"], rate(l.rate), l.rtt_ms ? ms(l.rtt_ms) : "–", count(l.outstanding), count(l.failed)]);
  });
}
