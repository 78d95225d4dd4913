// The leader's jobs. Snapshots bring only their counts: the list is asked for when those change.

import { body, byId, clock, count, el, fill, keep, rowOf, say, set, several, span } from "./dom.js";

const REFRESH_MS = 5000; // without a change of the counts, as estimates and times go on
const MARKS = { waiting: "asking", running: "stopping", done: "well", failed: "gone", quarantined: "impaired", cancelled: "asking", expired: "asking", schedule: "unseen" };
const ACTIONS = { waiting: "cancel", running: "cancel", schedule: "cancel", failed: "release", quarantined: "release" };
const WARNINGS = {
  waiting: "It is not started any more.",
  running: "It may have done a part of its work.",
  schedule: "It makes no more jobs. Those that it has made go on.",
  failed: "It waits again, with new attempts.",
  quarantined: "It may have run already, and waits again, with new attempts.",
};

let list = { jobs: [], searched: 0, may_change: false };
const opened = new Map(); // by id, as last told
let now_s = 0;
let seen = "";
let askedAt = -Infinity;
let asked = 0; // an answer that is overtaken by a newer question is not shown
let unanswered = 0;

const wanted = byId("jobs-wanted");
wanted.addEventListener("submit", (event) => event.preventDefault());
wanted.addEventListener("input", () => {
  opened.clear();
  refresh();
});

export function showJobs(snapshot) {
  const counts = snapshot.jobs;
  byId("jobs").hidden = !counts;
  if (!counts) return;
  now_s = snapshot.at;
  const parts = Object.entries(counts.states).filter(([, n]) => n).map(([state, n]) => [state, `${count(n)} ${state}`]);
  if (counts.schedules) parts.push(["schedule", several(counts.schedules, "schedule")]);
  keep(byId("jobs-counts"), parts.length ? parts : [["none", "none yet"]], ([state]) => state,
    ([state]) => el("span", { class: state === "quarantined" ? "text-impaired" : null }), (part, [, text]) => say(part, text));
  say(byId("jobs-problem"), counts.problem && `No jobs are accepted: ${counts.problem}`);
  byId("jobs-problem").hidden = !counts.problem;
  offerHandlers(snapshot);
  const news = JSON.stringify(counts);
  if (unanswered || (news === seen && performance.now() - askedAt < REFRESH_MS)) return;
  seen = news;
  refresh(byId("jobs").querySelector("table").matches(":hover, :has(:focus-visible)"));
}

function offerHandlers(snapshot) {
  const names = new Set(snapshot.processes.flatMap((p) => (p.handlers ?? []).map((h) => h.name)));
  keep(wanted.elements.handler, ["", ...[...names].sort()], (name) => name,
    (name) => el("option", { value: name }, name || "any handler"));
}

// The list stands still while it is being read; what was opened in it goes on.
async function refresh(isHeld = false) {
  const mine = (asked += 1);
  askedAt = performance.now();
  const { state, handler, text } = wanted.elements;
  const question = new URLSearchParams({ state: state.value, handler: handler.value, text: text.value });
  const ids = [...opened.keys()];
  unanswered += 1;
  const [found, ...stories] = await Promise.all([isHeld ? list : ask(`jobs?${question}`), ...ids.map((id) => ask(pathOf(id)))]);
  unanswered -= 1;
  if (mine !== asked) return;
  stories.forEach((job) => { if (opened.has(job.id)) opened.set(job.id, job); });
  list = found.problem ? { ...list, jobs: [], searched: 0 } : found;
  if (!isHeld) tell("jobs-trouble", found.problem);
  say(byId("jobs-held"), isHeld && list.jobs.length ? "held while you point at it" : "");
  draw();
}

async function ask(path, options) {
  try {
    const answer = await fetch(path, options);
    const found = await answer.json();
    return answer.ok ? found : { problem: found.problem };
  } catch {
    return { problem: "This page's own server does not answer." };
  }
}

const pathOf = (id) => `jobs/${encodeURIComponent(id)}`;

const stateOf = (job) => (job.every_s ? "schedule" : job.state);

function tell(id, text) {
  say(byId(id), text ?? "");
  byId(id).hidden = !text;
}

function draw() {
  const shown = new Set(list.jobs.map((job) => job.id));
  const jobs = [...[...opened.values()].filter((job) => !shown.has(job.id)), ...list.jobs];
  const rows = jobs.map((job) => opened.get(job.id) ?? job)
    .flatMap((job) => (opened.has(job.id) ? [{ job }, { job, isStory: true }] : [{ job }]));
  keep(body("jobs"), rows, ({ job, isStory }) => job.id + (isStory ? " story" : ""), makeRow, updateRow);
  byId("jobs").classList.toggle("is-empty", !rows.length);
  say(byId("jobs-none"), !byId("jobs-trouble").hidden ? "" : Object.values(wanted.elements).some((field) => field.value) ? "None like this." : "None yet.");
  say(byId("jobs-searched"), list.searched ? `${wanted.elements.text.value ? "among " : ""}the newest ${count(list.searched)}` : "");
}

function makeRow({ job, isStory }) {
  if (isStory) return el("tr", {}, el("td", { colspan: 9, class: "text" }, el("dl", { class: "facts" }), el("div", { class: "story" })));
  const row = rowOf("jobs");
  const id = el("button", { type: "button", class: "id", title: "what became of it" }, job.id);
  id.addEventListener("click", () => openOrClose(job));
  row.children[1].append(id);
  row.children[2].append(el("span"), el("span"));
  row.children[7].classList.add("text");
  const act = el("button", { type: "button", class: "act" });
  act.addEventListener("click", () => change(act.job));
  row.lastChild.append(act);
  return row;
}

function updateRow(row, { job, isStory }) {
  if (isStory) return showStory(row.firstChild, job);
  const state = stateOf(job);
  const [sign, words] = row.children[2].children;
  set(sign, { class: `mark ${MARKS[state] ?? "asking"}`, "aria-hidden": "true" });
  set(words, { class: { failed: "text-gone", quarantined: "text-impaired" }[state] ?? null });
  say(words, state);
  set(row.querySelector(".id"), { "aria-expanded": opened.has(job.id) });
  set(row.firstChild, { title: new Date(job.accepted_s * 1000).toLocaleString() });
  fill(row, [
    moment(job.accepted_s), null, null, `${job.handler || "default"}${job.team ? ` of ${job.team}` : ""}`, job.caller,
    tookOf(job), job.every_s ? "" : `${job.attempts} of ${job.max_attempts}`, remarkOf(job), null,
  ]);
  const act = row.querySelector(".act");
  const action = list.may_change ? ACTIONS[state] : undefined;
  act.job = job;
  act.hidden = !action;
  say(act, action ?? "");
  set(act, { "aria-label": action ? `${action} ${job.id}` : null });
  return row;
}

// With the day, if it was not today.
function moment(at) {
  if (!at) return "–";
  const day = new Date(at * 1000);
  const isToday = day.toDateString() === new Date(now_s * 1000).toDateString();
  return isToday ? clock(at) : `${day.toLocaleDateString("en-US", { month: "short", day: "numeric" })} ${clock(at).slice(0, 5)}`;
}

const everyOf = (job) => `every ${span(job.every_s).replace(/ 0 (s|min)$/, "")}`;

function tookOf(job) {
  if (job.every_s) return everyOf(job);
  if (!job.started_s || !(job.ended_s || job.state === "running")) return "–";
  const took_s = Math.max(0, (job.ended_s || now_s) - job.started_s);
  return took_s < 10 ? `${took_s.toFixed(took_s < 1 ? 3 : 1)} s` : span(took_s);
}

// What a row says at its end: when it begins, if it waits for that, and why it failed.
function remarkOf(job) {
  const parts = [];
  if (job.every_s) parts.push(`next ${moment(job.due_s)}`, job.missed && `${count(job.missed)} left out`);
  else if (job.state === "waiting" && job.due_s > now_s) parts.push(`not before ${moment(job.due_s)}`);
  else if (job.state === "running") parts.push(job.progress_text);
  return [...parts, job.reason].filter(Boolean).join("; ");
}

async function openOrClose(job) {
  if (opened.delete(job.id)) return draw();
  opened.set(job.id, { story: [], ...job });
  const found = await ask(pathOf(job.id));
  if (opened.has(job.id)) opened.set(job.id, found.problem ? { ...job, story: [], reason: found.problem } : found);
  draw();
}

function showStory(cell, job) {
  const place = job.position && `${job.position_is_more ? "after more than" : "number"} ${count(job.position)} among the jobs of this caller that ask the same`;
  const facts = [
    ["place", place && `${place}${job.wait_s ? `, starts in about ${span(Math.max(1, job.wait_s))}` : ""}`],
    ["next", job.every_s > 0 && `${moment(job.due_s)}, then ${everyOf(job)}`],
    ["not before", !job.every_s && job.state === "waiting" && job.due_s > now_s && moment(job.due_s)],
    ["not after", job.expires_s > 0 && moment(job.expires_s)],
    ["asks", `${job.mode === "all" ? "all workers" : "any one worker"}${job.priority ? `, priority ${job.priority}` : ""}`],
    ["key", job.key],
    ["schedule", job.schedule],
    ["size", `${count(job.bytes)} bytes, payload and answer`],
  ].filter(([, value]) => value);
  keep(cell.querySelector("dl"), facts.flatMap(([name, value]) => [[name, "dt", name], [name, "dd", value]]),
    ([name, tag]) => name + tag, ([, tag]) => el(tag), (part, [, , text]) => say(part, text));
  keep(cell.querySelector(".story"), job.story.map((event, at) => ({ ...event, number: at })), (event) => `${event.number} ${event.at_s}`,
    () => el("p", {}, el("span", { class: "quiet" }), el("span")), (part, event) => {
      say(part.firstChild, moment(event.at_s));
      say(part.lastChild, event.text);
    });
}

// The leader has the last word on what may be changed, and by whom.
async function change(job) {
  const action = ACTIONS[stateOf(job)];
  const what = `${job.every_s ? "schedule" : "job"} ${job.id}`;
  if (!confirm(`${action} ${what}?\n\n${job.handler || "default"}, of ${job.caller}. ${WARNINGS[stateOf(job)]}`)) return;
  const found = await ask(pathOf(job.id), {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ action }),
  });
  const done = { cancel: "is cancelled", release: "waits again" }[action];
  tell("jobs-said", found.problem ? `${what} was not changed: ${found.problem}` : `${what} ${done}`);
  byId("jobs-said").classList.toggle("warning", Boolean(found.problem));
  refresh();
}
