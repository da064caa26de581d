"use strict";
// One page over the server's own calls. What comes from the server becomes text, never markup.

const KEY = "hira-key"; // in the storage of the session: gone with the tab
const EVERY_MS = 2000;
const POINTS = 150; // of a chart: five minutes
const CHOSEN_MOST = 4;
const OFFERED_MOST = 100; // boxes beside those that are chosen

const find = (id) => document.getElementById(id);
const key = () => sessionStorage.getItem(KEY) || "";

function made(tag, text, attributes = {}) {
  const one = document.createElement(tag);
  if (text !== undefined && text !== null) one.textContent = text;
  for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
  return one;
}

function drawn(tag, attributes = {}, text) {
  const one = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
  if (text !== undefined) one.textContent = text;
  return one;
}

class Refused extends Error {
  constructor(status, problem) {
    const told = problem.problems || [problem];
    super(told.map(worded).join("\n"));
    this.status = status;
  }
}

function worded(one) {
  const lines = [`${one.code || ""}: ${one.detail || one.error || "refused"}`];
  for (const part of ["field", "found", "expected", "fix"]) {
    if (one[part]) lines.push(`  ${part}: ${one[part]}`);
  }
  return lines.join("\n");
}

async function call(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  if (options.body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) {
    let problem = {};
    try { problem = await answer.json(); } catch { problem = { detail: `HTTP ${answer.status}` }; }
    throw new Refused(answer.status, problem);
  }
  return answer;
}

function say(text) {
  const place = find("message");
  place.hidden = !text;
  place.textContent = text || "";
}

// The state of the server

const STATES = {
  ready: "ready",
  starting: "starting: the base is being loaded",
  draining: "draining: running requests end, new ones are refused",
  stopping: "stopping",
  restarting: "restarting: this part of the server ends and comes again",
  worker_lost: "worker down: a new one is being started",
  worker_silent: "worker down: it has not been heard",
  worker_stuck: "worker stuck in a step",
};

async function lookState() {
  const place = find("state");
  let text = "no answer: the server is not there, or cannot be reached";
  let ready = false;
  try {
    const answer = await fetch("/health/ready");
    const told = await answer.json();
    ready = answer.ok;
    text = STATES[told.status] || told.status;
    if (!ready && told.detail) text += ` (${told.detail})`;
  } catch { /* as above */ }
  if (place.textContent !== text) place.textContent = text;
  place.className = `state ${ready ? "good" : "bad"}`;
}

// Metrics

function parsed(text) {
  const samples = [];
  const line = /^(\w+)(?:\{(.*)\})? ([^ ]+)/;
  for (const one of text.split("\n")) {
    if (one.startsWith("#")) continue;
    const found = line.exec(one);
    if (!found) continue;
    const labels = {};
    for (const part of (found[2] || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[part[1]] = part[2];
    samples.push({ name: found[1], labels, value: Number(found[3]) });
  }
  return samples;
}

function summed(samples, name, keep = () => true) {
  let total = 0;
  for (const one of samples) if (one.name === name && keep(one.labels)) total += one.value;
  return total;
}

const MIB = 1048576;
const charts = [
  { title: "Requests a second", lines: { "": (now, was, s) => gain(now, was, "hira_requests_total") / s } },
  { title: "Tokens a second", lines: { "": (now, was, s) => gain(now, was, "hira_tokens_total") / s } },
  { title: "Requests in the engine", lines: { "": (now) => summed(now, "hira_queue_depth") } },
  { title: "Rows of a batch, mean", lines: { "": (now, was) => mean(now, was, "hira_batch_rows") } },
  { title: "Adapters of a batch, mean", lines: { "": (now, was) => mean(now, was, "hira_batch_adapters") } },
  {
    title: "Adapters in memory, MiB",
    lines: Object.fromEntries(["device", "host", "folded", "heads"].map((tier) => [
      tier, (now) => summed(now, "hira_adapter_bytes", (one) => one.tier === tier) / MIB,
    ])),
  },
];

function gain(now, was, name) {
  return was ? Math.max(0, summed(now, name) - summed(was, name)) : 0;
}

function mean(now, was, name) {
  const steps = gain(now, was, `${name}_count`);
  return steps ? gain(now, was, `${name}_sum`) / steps : 0;
}

function prepareCharts() {
  for (const chart of charts) {
    const figure = made("figure");
    const picture = drawn("svg", { viewBox: "0 0 300 100", preserveAspectRatio: "none", "aria-hidden": "true" });
    for (const y of [1, 50, 99]) picture.append(drawn("line", { class: "grid", x1: 0, x2: 300, y1: y, y2: y }));
    const caption = made("figcaption", chart.title);
    const told = made("p", null, { class: "told" });
    chart.most = made("span", "", { class: "note" });
    chart.shown = Object.entries(chart.lines).map(([name, of], place) => {
      const line = drawn("polyline", { class: `series line-${place}`, points: "" });
      picture.append(line);
      const value = made("b", "-");
      const part = made("span", null, name ? { class: `key line-${place}` } : {});
      part.append(name ? `${name} ` : "", value);
      told.append(part, " ");
      return { of, line, value, values: [] };
    });
    told.append(chart.most);
    figure.append(caption, told, picture);
    find("charts").append(figure);
  }
}

function drawChart(chart, now, seconds) {
  for (const one of chart.shown) {
    const value = one.of(now, lastSamples, seconds);
    one.values.push(value);
    if (one.values.length > POINTS) one.values.shift();
    one.value.textContent = value.toFixed(1);
  }
  const most = Math.max(...chart.shown.flatMap((one) => one.values), 1e-9);
  const step = 300 / (POINTS - 1);
  for (const one of chart.shown) {
    const from = POINTS - one.values.length;
    one.line.setAttribute("points", one.values.map((value, i) => `${((from + i) * step).toFixed(1)},${(98 - 95 * value / most).toFixed(1)}`).join(" "));
  }
  chart.most.textContent = `most ${most < 1e-6 ? "0.0" : most.toFixed(1)}`;
}

let lastSamples = null;
let lastAt = 0;
let rates = new Map();
let errors = new Map();

// Without metrics nothing is shown, for an old figure would look like one of now.
function forgetMetrics(why) {
  lastSamples = null;
  rates = new Map();
  errors = new Map();
  for (const chart of charts) {
    chart.most.textContent = "";
    for (const one of chart.shown) {
      one.values = [];
      one.value.textContent = "-";
      one.line.setAttribute("points", "");
    }
  }
  noteLive(why);
}

function noteLive(text) {
  if (find("live-note").textContent !== text) find("live-note").textContent = text;
}

async function lookMetrics() {
  let answer;
  let text;
  try {
    answer = await fetch("/metrics", key() ? { headers: { Authorization: `Bearer ${key()}` } } : {});
    text = await answer.text();
  } catch {
    forgetMetrics("No figures: the server does not answer.");
    return;
  }
  if (!answer.ok) {
    const refused = [401, 403].includes(answer.status);
    forgetMetrics(refused ? "No figures: this needs a key that may read /metrics." : `No figures: /metrics answers ${answer.status}.`);
    return;
  }
  const now = parsed(text);
  const at = performance.now();
  const seconds = Math.max(0.001, (at - lastAt) / 1000);
  const before = new Map();
  if (lastSamples) for (const one of lastSamples) if (one.name === "hira_requests_total") before.set(JSON.stringify(one.labels), one.value);
  rates = new Map();
  errors = new Map();
  for (const one of now) {
    const name = one.labels.adapter;
    if (one.name === "hira_requests_total") {
      const grown = lastSamples ? one.value - (before.get(JSON.stringify(one.labels)) || 0) : 0;
      rates.set(name, (rates.get(name) || 0) + Math.max(0, grown) / seconds);
      if (one.labels.status >= "400") errors.set(name, (errors.get(name) || 0) + one.value);
    } else if (one.name === "hira_failures_total") {
      errors.set(name, (errors.get(name) || 0) + one.value);
    }
  }
  for (const chart of charts) drawChart(chart, now, seconds);
  lastSamples = now;
  lastAt = at;
  noteLive("");
}

// Adapters

let records = [];
let models = []; // whom a text can be put to: the base, and each adapter
let shownRows = "";
let shownChoices = "";
let shownAudited = "";
let picked = false; // whether somebody has chosen other boxes than those of the beginning
let lastNames = "";

async function lookModels() {
  const told = await (await call("/v1/models")).json();
  models = told.data.filter((one) => !one.alias_of).map((one) => ({ name: one.id, task: one.task || "", base: !one.parent }));
}

async function lookAdapters() {
  const note = find("adapters-note");
  if (key()) {
    try {
      // Of thousands only a page: all of them every few seconds would be work for the server.
      const wanted = find("filter").value.trim().slice(0, 64);
      const first = await (await call("/admin/adapters?limit=500")).json();
      const isPart = first.total > first.adapters.length;
      const prefix = encodeURIComponent(wanted);
      const page = isPart && wanted ? await (await call(`/admin/adapters?limit=500&prefix=${prefix}`)).json() : first;
      records = page.adapters;
      note.textContent = `${first.total} registered`;
      if (isPart) {
        note.textContent += wanted ? `, ${page.total} of them begin with ${wanted}` : "; the first 500 are shown: say how a name begins";
      }
      const names = JSON.stringify([first.total, records.map((one) => [one.name, one.task])]);
      if (names !== lastNames) await lookModels();
      lastNames = names;
      showAdapters(true);
      return;
    } catch (error) {
      if (!(error instanceof Refused) || ![401, 403].includes(error.status)) throw error;
      note.textContent = "This key is not the admin key: names only, and no changes.";
    }
  } else {
    note.textContent = "Names only. With the admin key above: versions, states, errors, and changes.";
  }
  await lookModels();
  records = models.filter((one) => !one.base);
  showAdapters(false);
}

function where(one) {
  if (one.quarantined_until) return `quarantined until ${one.quarantined_until.slice(11, 19)}: ${one.quarantine_reason}`;
  if (one.residency === "lost") return "lost: its bytes are gone, register it again";
  if (one.canary && one.canary.residency === "lost") return `${one.residency}; the bytes of its canary are gone`;
  if (one.served === false) return "made for another base";
  return `${one.residency || ""}${one.pinned ? ", pinned" : ""}`;
}

function showAdapters(admin) {
  const wanted = find("filter").value.trim();
  const shown = records.filter((one) => one.name.startsWith(wanted)).slice(0, 500);
  const state = JSON.stringify([admin, shown, Boolean(lastSamples), [...rates], [...errors]]);
  if (state !== shownRows && !find("adapter-rows").contains(document.activeElement)) {
    shownRows = state;
    find("adapter-rows").replaceChildren(...shown.map((one) => row(one, admin)));
  }
  const choices = JSON.stringify([wanted, models]);
  if (choices !== shownChoices) {
    shownChoices = choices;
    showChoices(wanted);
  }
  showAudited();
}

function versionText(one) {
  const text = (one.version || "").slice(0, 12);
  return one.canary ? `${text}, canary ${one.canary.version.slice(0, 12)} at ${one.canary.share} %` : text;
}

const COLUMNS = ["Name", "Version", "Task", "Method", "Where", "Requests/s", "Requests", "Errors", "Actions"];

function row(one, admin) {
  const cells = [
    made("th", one.aliases && one.aliases.length ? `${one.name} (${one.aliases.join(", ")})` : one.name, { scope: "row" }),
    made("td", versionText(one), one.version ? { title: one.version } : {}),
    made("td", one.task),
    made("td", one.method ? `${one.method}, r ${[...new Set(one.ranks)].join(" to ")}` : ""),
    made("td", where(one), one.quarantined_until || one.residency === "lost" || (one.canary && one.canary.residency === "lost") ? { class: "error" } : {}),
    made("td", lastSamples ? (rates.get(one.name) || 0).toFixed(1) : "-", { class: "number" }),
    made("td", one.requests ?? "", { class: "number" }),
    made("td", lastSamples ? errors.get(one.name) || 0 : "-", { class: "number" }),
  ];
  const actions = made("td");
  if (admin) {
    const path = `/admin/adapters/${encodeURIComponent(one.name)}`;
    const button = (text, act) => {
      const made_ = made("button", text, { type: "button", "aria-label": `${text} ${one.name}` });
      made_.addEventListener("click", () => done(act));
      actions.append(made_, " ");
    };
    const patch = (body) => call(path, { method: "PATCH", body: JSON.stringify(body) });
    button(one.pinned ? "Unpin" : "Pin", () => patch({ pinned: !one.pinned }));
    if (one.quarantined_until) button("End quarantine", () => patch({ preload: true }));
    const versions = made("button", "Versions", { type: "button", "aria-label": `Versions of ${one.name}` });
    versions.addEventListener("click", () => showVersions(one.name));
    actions.append(versions, " ");
    button("Remove", async () => {
      if (await sure(`Remove ${one.name}? Requests that run finish; later ones get 404.`)) await call(path, { method: "DELETE" });
    });
  }
  const line = made("tr", null, { role: "row" });
  line.append(...cells, actions);
  // Roles by name, for on a phone the table is laid out as cards.
  [...line.children].forEach((cell, place) => {
    cell.setAttribute("role", place ? "cell" : "rowheader");
    cell.setAttribute("data-column", COLUMNS[place]);
  });
  return line;
}

// What a name was on, and back to it

async function showVersions(name) {
  say("");
  const dialog = find("versions");
  find("versions-title").textContent = `Versions of ${name}`;
  find("versions-rows").replaceChildren();
  find("versions-note").textContent = "";
  if (!dialog.open) dialog.showModal();
  try {
    const path = `/admin/adapters/${encodeURIComponent(name)}`;
    const told = await (await call(`${path}/versions`)).json();
    const shown = records.find((one) => one.name === name) || {};
    find("versions-note").textContent = `Of ${told.kept_versions} old versions the bytes are kept, so that the name can go back to them.`;
    if (shown.canary) find("versions-note").textContent += ` The canary ${shown.canary.version.slice(0, 12)} answers ${shown.canary.share} % of the requests; rolling back ends it. ${armText(name)}`;
    find("versions-rows").replaceChildren(...told.versions.map((one) => versionRow(name, path, one)));
  } catch (error) {
    find("versions-note").textContent = error.message;
  }
}

function armText(name) {
  if (!lastSamples) return "How it does is not known without metrics.";
  const told = ["stable", "canary"].map((arm) => {
    const own = (one) => one.adapter === name && one.arm === arm;
    const all = summed(lastSamples, "hira_canary_requests_total", own);
    const bad = summed(lastSamples, "hira_canary_requests_total", (one) => own(one) && one.status >= "400");
    return `${arm}: ${all} requests, ${bad} errors`;
  });
  return `${told.join("; ")}.`;
}

function versionRow(name, path, one) {
  const act = one.restores ? `rolled back to ${one.restores}` : one.act;
  const line = made("tr");
  line.append(
    made("th", one.number, { scope: "row" }),
    made("td", one.version.slice(0, 12), { title: one.version }),
    made("td", one.at.slice(0, 19).replace("T", " ")),
    made("td", act),
    made("td", (one.bytes / 1048576).toFixed(2), { class: "number" }),
    made("td", one.current ? "current" : one.kept ? "kept" : "gone"),
  );
  const actions = made("td");
  if (one.kept && !one.current) {
    const back = made("button", "Roll back", { type: "button", "aria-label": `Roll back ${name} to number ${one.number}` });
    back.addEventListener("click", async () => {
      try {
        if (!await sure(`Put ${name} back on ${one.version.slice(0, 12)}? No later request is answered otherwise.`, "Roll back")) return;
        await call(`${path}/rollback`, { method: "POST", body: JSON.stringify({ version: one.version }) });
        await showVersions(name);
        await lookAdapters();
      } catch (error) {
        find("versions-note").textContent = error.message;
      }
    });
    actions.append(back);
  }
  line.append(actions);
  return line;
}

function sure(text, yes = "Remove it") {
  const dialog = find("sure");
  find("sure-text").textContent = text;
  find("sure-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

async function done(act) {
  say("");
  try {
    await act();
    if (document.activeElement) document.activeElement.blur();
    await lookAdapters();
  } catch (error) {
    say(error.message);
  }
}

// One text to several adapters

function showChoices(wanted) {
  const before = new Set(chosen());
  // To begin with, those that do what the first adapter does: their answers can be compared.
  const alike = models.filter((one) => !one.base && one.task === (models.find((each) => !each.base) || one).task).slice(0, 2);
  const isChosen = (one) => (picked ? before.has(one.name) : alike.includes(one));
  let room = OFFERED_MOST; // thousands of boxes help nobody
  const offered = models.filter((one) => one.base || isChosen(one) || (one.name.startsWith(wanted) && room-- > 0));
  const boxes = offered.map((one) => {
    const box = made("input", null, { type: "checkbox", value: one.name });
    box.checked = isChosen(one);
    box.addEventListener("change", () => {
      picked = true;
      limitChoices();
    });
    const label = made("label");
    label.append(box, `${one.name} (${one.base ? "base, " : ""}${one.task})`);
    return label;
  });
  find("choices").replaceChildren(...boxes);
  const hidden = models.length - offered.length;
  find("choices-note").textContent = hidden ? `${hidden} more are not shown: say how a name begins, above the table of adapters.` : "";
  limitChoices();
}

// Of thousands the table has a page only; those of another base are in the table only.
function showAudited() {
  const names = [...new Set([...models.filter((one) => !one.base), ...records].map((one) => one.name))].sort();
  const state = JSON.stringify(names);
  if (state === shownAudited) return;
  shownAudited = state;
  const audited = find("audited");
  const kept = audited.value;
  audited.replaceChildren(...names.map((name) => made("option", name, { value: name })));
  if (kept) audited.value = kept;
}

function chosen() {
  return [...find("choices").querySelectorAll("input:checked")].map((one) => one.value);
}

function limitChoices() {
  const full = chosen().length >= CHOSEN_MOST;
  for (const box of find("choices").querySelectorAll("input")) box.disabled = full && !box.checked;
}

let asking = new AbortController();

async function askAll(event) {
  event.preventDefault();
  asking.abort();
  asking = new AbortController();
  const text = find("text").value;
  const cards = chosen().map((name) => {
    const card = made("article", null, { class: "card" });
    card.append(made("h3", name), made("p", "...", { class: "said" }));
    return [name, card];
  });
  find("answers").replaceChildren(...cards.map(([, card]) => card));
  await Promise.all(cards.map(([name, card]) => askOne(name, card, text, asking.signal)));
}

async function askOne(name, card, text, signal) {
  const record = models.find((one) => one.name === name) || {};
  const query = `?adapter=${encodeURIComponent(name)}`;
  const place = card.querySelector(".said");
  try {
    if (record.task === "text-generation" || !record.task) {
      const parameters = { max_new_tokens: Number(find("tokens").value) || 48 };
      const body = JSON.stringify({ inputs: text, parameters });
      const answer = await call(`/generate_stream${query}`, { method: "POST", body, signal });
      place.textContent = "";
      for await (const told of events(answer)) {
        if (told.error) throw new Error(told.error);
        if (told.token && !told.token.special) place.textContent += told.token.text;
      }
    } else if (record.task === "feature-extraction") {
      const answer = await call(`/embed${query}`, { method: "POST", body: JSON.stringify({ inputs: text }), signal });
      const [vector] = await answer.json();
      place.textContent = `${vector.length} numbers: ${vector.slice(0, 8).map((one) => one.toFixed(4)).join(" ")} ...`;
    } else {
      const answer = await call(`/predict${query}`, { method: "POST", body: JSON.stringify({ inputs: text }), signal });
      place.textContent = "";
      for (const one of (await answer.json()).flat().slice(0, 10)) card.append(labelRow(one));
    }
  } catch (error) {
    place.textContent = error.name === "AbortError" ? `${place.textContent} (stopped)` : error.message;
    place.classList.toggle("error", error.name !== "AbortError");
  }
}

function labelRow(one) {
  const line = made("div", null, { class: "label-row" });
  const label = one.label || one.entity_group || one.token_str || one.answer || "";
  const word = one.word ? `${label}: ${one.word}` : label;
  const bar = made("meter", null, { min: 0, max: 1, value: one.score, "aria-label": word });
  line.append(made("span", word), bar, made("span", one.score.toFixed(4), { class: "number" }));
  return line;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done: ended } = await reader.read();
    if (ended) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield JSON.parse(line.slice(5));
  }
}

// Audit

async function audit(event) {
  event.preventDefault();
  const place = find("report");
  try {
    const name = find("audited").value;
    const told = await (await call(`/admin/adapters/${encodeURIComponent(name)}/audit`)).json();
    place.replaceChildren(...report(told));
  } catch (error) {
    place.replaceChildren(made("p", error.message, { class: "error said" }));
  }
}

function report(told) {
  const found = [made("p", ["Nothing is contradicted.", "1 finding"][told.findings.length] || `${told.findings.length} findings`)];
  if (told.findings.length) {
    const table = made("table");
    const head = made("tr");
    for (const text of ["Kind", "About", "Claimed", "Proven"]) head.append(made("th", text, { scope: "col" }));
    table.append(head);
    for (const one of told.findings) {
      const line = made("tr");
      for (const text of [one.severity, one.subject, one.claim, one.proof]) line.append(made("td", text));
      table.append(line);
    }
    const scroll = made("div", null, { class: "scroll", tabindex: 0, role: "region", "aria-label": "Findings" });
    scroll.append(table);
    found.push(scroll);
  }
  const title = `Rank of each layer (${told.method}, ${told.parameters.toLocaleString("en")} numbers)`;
  found.push(made("h3", title), rankPicture(Object.entries(told.ranks), title));
  return found;
}

// A column for each layer, a row for each of its modules; the darker, the higher the rank.
function rankPicture(ranks, title) {
  const most = Math.max(1, ...ranks.map(([, rank]) => rank));
  const rows = new Map();
  const layers = new Set();
  for (const [path, rank] of ranks) {
    const layer = (/\.(\d+)\./.exec(path) || [null, "-"])[1];
    const module = layer === "-" ? path : path.slice(path.indexOf(`.${layer}.`) + layer.length + 2);
    layers.add(layer);
    if (!rows.has(module)) rows.set(module, new Map());
    rows.get(module).set(layer, rank);
  }
  const columns = [...layers].sort((one, other) => Number(one) - Number(other));
  const table = made("table", null, { class: "ranks" });
  const head = made("tr");
  head.append(...["Module", ...columns].map((text) => made("th", text, { scope: "col" })));
  table.append(head);
  for (const [module, of] of rows) {
    const line = made("tr");
    line.append(made("th", module, { scope: "row" }));
    for (const layer of columns) {
      const rank = of.get(layer);
      const cell = made("td", rank ?? "");
      if (rank) cell.style.setProperty("--share", `${Math.round(70 * rank / most)}%`);
      line.append(cell);
    }
    table.append(line);
  }
  const scroll = made("div", null, { class: "scroll", tabindex: 0, role: "region", "aria-label": title });
  scroll.append(table);
  return scroll;
}

// Start

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (find("key").value) sessionStorage.setItem(KEY, find("key").value);
  find("key").value = "";
  done(async () => {});
});
find("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  find("key").value = "";
  done(async () => {});
});
find("filter").addEventListener("input", () => { shownRows = ""; showAdapters(Boolean(records[0] && records[0].version)); });
find("try-form").addEventListener("submit", askAll);
find("stop").addEventListener("click", () => asking.abort());
find("audit-form").addEventListener("submit", audit);
prepareCharts();

async function turn() {
  find("key-note").textContent = key() ? "a key is in use" : "";
  await lookState();
  try {
    await lookMetrics();
    await lookAdapters();
  } catch (error) {
    if (error instanceof Refused && error.status < 500) say(error.message);
    showAdapters(Boolean(records[0] && records[0].version)); // what is known, without old figures
  }
  setTimeout(turn, document.hidden ? 5 * EVERY_MS : EVERY_MS);
}
turn();
