"use strict";
// Asks the service over its own routes: /info, /ready, /metrics and /v1/reward. The token is a variable of this script and
// nothing else: it is in no address, no storage and no cookie. Every text goes into the page as text, never as HTML.
(() => {
  const POLL_MS = 2000, WINDOW_MS = 60000, POLL_LIMIT_MS = 10000;
  const ROLES = ["user", "assistant", "system"];
  const PREFIX = "rlhf_scoring_";
  const NONE = "\u2013";
  const base = location.origin + location.pathname; // without the name and password that an address may hold
  const byId = (id) => document.getElementById(id);
  let token = null, models = [], info = null, snapshots = [], scoring = null, open = false, refreshing = false, lastInput = 0;

  class Refused extends Error {
    constructor(status, message) { super(message); this.status = status; }
  }

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  async function ask(path, { body, signal } = {}) {
    const headers = {};
    if (token !== null) headers.Authorization = `Bearer ${token}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    return fetch(new URL(path, base), {
      method: body === undefined ? "GET" : "POST",
      body: body === undefined ? undefined : JSON.stringify(body),
      headers, signal, credentials: "omit", cache: "no-store", redirect: "error", referrerPolicy: "no-referrer",
    });
  }

  async function answerOf(response) {
    const text = await response.text();
    let value = null;
    try { value = JSON.parse(text); } catch { value = null; }
    if (response.ok) return value;
    const said = value && (typeof value.error === "string" ? value.error : value.error && value.error.message);
    throw new Refused(response.status, said || `the service answered with status ${response.status}`);
  }

  const poll = (path) => ask(path, { signal: AbortSignal.timeout(POLL_LIMIT_MS) });

  // The token

  function askForToken(note) {
    open = false;
    token = null;
    byId("service").hidden = true;
    byId("login").hidden = false;
    byId("login-note").textContent = note;
    setHealth("", "");
    byId("token").focus();
  }

  async function enter() {
    try {
      await readInfo();
    } catch (error) {
      if (error instanceof Refused && error.status === 401) {
        askForToken(token === null ? "" : "The service does not know this token.");
        return;
      }
      setHealth("bad", "not reachable");
      byId("login-note").textContent = `The service cannot be asked: ${error.message}`;
      return;
    }
    open = true;
    byId("login").hidden = true;
    byId("service").hidden = false;
    refresh();
  }

  byId("login").addEventListener("submit", (event) => {
    event.preventDefault();
    const typed = byId("token").value.trim();
    if (!/^[!-~]+$/.test(typed)) {
      byId("login-note").textContent = "A token has no spaces and only letters, digits and signs of ASCII.";
      return;
    }
    token = typed;
    byId("token").value = "";
    byId("login-note").textContent = "";
    enter();
  });

  // What is served

  async function readInfo() {
    info = await answerOf(await poll("info"));
    models = info.models;
    const select = byId("model"), chosen = select.value;
    select.replaceChildren(...models.map((model) => element("option", { value: model.name, textContent: model.name })));
    if (models.some((model) => model.name === chosen)) select.value = chosen;
    byId("choice").hidden = models.length < 2;
    showModel();
  }

  const model = () => models.find((one) => one.name === byId("model").value) || models[0];

  // Turns are for a model that reads conversations; an encoder (reads is null) takes both forms.
  const readsTurns = () => !model().reads || model().reads.forms.includes("conversation");

  function showModel() {
    const served = model(), reads = served.reads;
    byId("title").textContent = served.model;
    document.title = `${served.name}: reward model`;
    const facts = {
      "form, token": reads ? reads.sentence : "reads a prompt and its response as a pair of texts, scored at the first token",
      "chat template": readsTurns() ? `sha256 ${served.template}` : "not used: it reads texts",
      "tokenizer": `sha256 ${served.fingerprint}`,
      "longest item": served.max_tokens === undefined ? NONE : `${served.max_tokens} tokens`,
      "reward": served.mean === null || served.mean === undefined
        ? "the score as it is" : `(score \u2212 ${short(served.mean)}) / ${short(served.std)}`,
      "version": `${served.version}${served.revision ? `, revision ${served.revision}` : ""}, ${served.dtype || NONE}`,
    };
    byId("reading").replaceChildren(...Object.entries(facts).flatMap(
      ([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]));
    showTurns();
  }

  // The conversation

  function addTurn(role, text = "") {
    const select = element("select", { ariaLabel: "role of the turn" },
      ...ROLES.map((one) => element("option", { value: one, textContent: one })));
    select.value = role;
    const words = element("textarea", { rows: 3, value: text, ariaLabel: "text of the turn" });
    const remove = element("button", { type: "button", className: "quiet", textContent: "Remove" });
    const turn = element("div", { className: "turn" }, select, words, remove);
    remove.addEventListener("click", () => { turn.remove(); showTurns(); staleScores(); });
    byId("turns").append(turn);
  }

  function showTurns() {
    const turns = [...byId("turns").children], several = readsTurns();
    byId("add-turn").hidden = !several;
    turns.forEach((turn, position) => {
      turn.hidden = !several && position > 0;
      turn.classList.toggle("alone", !several);
      turn.querySelector("select").hidden = !several;
      turn.querySelector("button").hidden = !several || turns.length === 1;
    });
  }

  byId("add-turn").addEventListener("click", () => {
    const turns = readTurns(), last = turns[turns.length - 1];
    addTurn(last && last.role === "user" ? "assistant" : "user");
    showTurns();
    byId("turns").lastElementChild.querySelector("textarea").focus();
    staleScores();
  });

  const readTurns = () => [...byId("turns").children].map((turn) => ({
    role: turn.querySelector("select").value, content: turn.querySelector("textarea").value }));

  function item(name) {
    const response = byId(`text-${name}`).value, turns = readTurns();
    const asTexts = !readsTurns() || (!model().reads && turns.length === 1 && turns[0].role === "user");
    const written = asTexts
      ? { prompt: turns[0].content, response }
      : { messages: [...turns, { role: "assistant", content: response }] };
    return byId(`cut-${name}`).checked ? { ...written, finished: false } : written;
  }

  // Scores

  const short = (value) => (Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3)
    ? value.toExponential(3) : value.toFixed(4));

  function showResult(name, result) {
    const card = byId(`answer-${name}`), place = card.querySelector(".result");
    const failed = !result || result.error !== null;
    place.classList.toggle("failed", failed);
    place.classList.remove("stale");
    card.classList.remove("better");
    const score = place.querySelector(".score"), details = place.querySelector(".details");
    if (!result) { score.replaceChildren(); details.textContent = ""; return; }
    if (failed) {
      score.textContent = `no score: ${result.error}`;
      details.textContent = { item: "it cannot be scored as it is", model: "the model gave no number",
        source: "the model failed; another try may succeed" }[result.fault] || "";
      return;
    }
    score.replaceChildren(element("data", { value: String(result.raw), textContent: short(result.raw),
      title: String(result.raw) }));
    const parts = [`reward ${short(result.reward)}`, `${result.tokens} tokens`];
    if (result.truncated) parts.push("its beginning was cut off");
    details.textContent = parts.join(" \u00b7 ");
  }

  function showVerdict(a, b, seconds, version) {
    const took = `${(1000 * seconds).toFixed(0)} ms, version ${version}`;
    if (a.error !== null || b.error !== null) { byId("verdict").textContent = took; return; }
    const difference = a.raw - b.raw;
    if (difference === 0) { byId("verdict").textContent = `Both score the same (${took})`; return; }
    const better = difference > 0 ? "A" : "B";
    byId(`answer-${better.toLowerCase()}`).classList.add("better");
    const share = 1 / (1 + Math.exp(-Math.abs(difference)));
    byId("verdict").textContent =
      `${better} scores higher by ${short(Math.abs(difference))}, by Bradley\u2013Terry preferred in ${(100 * share).toFixed(1)} % (${took})`;
  }

  function staleScores() {
    lastInput += 1;
    for (const place of document.querySelectorAll(".result")) place.classList.add("stale");
    byId("verdict").textContent = "";
    for (const card of document.querySelectorAll(".answer")) card.classList.remove("better");
  }

  function busy(controller) {
    scoring = controller;
    byId("score").textContent = controller === null ? "Score" : "Cancel";
    byId("score").classList.toggle("quiet", controller !== null);
  }

  async function score() {
    const controller = new AbortController(), input = lastInput, began = performance.now();
    busy(controller);
    byId("problem").textContent = "";
    try {
      const body = { items: [item("a"), item("b")], model: model().name };
      const response = await ask("v1/reward", { body, signal: controller.signal });
      const scored = await answerOf(response);
      const seconds = (performance.now() - began) / 1000;
      ["a", "b"].forEach((name, position) => showResult(name, scored.results[position]));
      showVerdict(scored.results[0], scored.results[1], seconds, scored.version);
      if (input !== lastInput) staleScores(); // something was typed meanwhile
      if (scored.version !== model().version) await readInfo(); // a new version has taken over since
    } catch (error) {
      ["a", "b"].forEach((name) => showResult(name, null));
      byId("verdict").textContent = "";
      if (error instanceof Refused && error.status === 401) askForToken("The service no longer knows the token.");
      else if (error.name !== "AbortError") {
        byId("problem").textContent = error instanceof Refused ? error.message : `no answer: ${error.message}`;
      }
    } finally {
      busy(null);
    }
  }

  byId("compare").addEventListener("submit", (event) => {
    event.preventDefault();
    if (scoring !== null) scoring.abort(); else score();
  });
  byId("compare").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && scoring === null) { event.preventDefault(); score(); }
  });
  byId("compare").addEventListener("input", staleScores);
  byId("model").addEventListener("change", () => { showModel(); staleScores(); });

  // Queue, latency, health

  function readMetrics(text) {
    const values = new Map();
    for (const line of text.split("\n")) {
      if (!line.startsWith(PREFIX)) continue;
      const end = line.lastIndexOf(" ");
      values.set(line.slice(PREFIX.length, end), Number(line.slice(end + 1)));
    }
    return values;
  }

  const label = (key, name) => (key.match(new RegExp(`[{,]${name}="([^"]*)"`)) || [])[1];

  // What a counter has gained since the oldest snapshot of the window, summed over all of its labels that `chosen` takes.
  function gained(name, chosen = () => true) {
    const now = snapshots[snapshots.length - 1].values, before = snapshots[0].values;
    let sum = 0;
    for (const [key, value] of now) {
      if ((key === name || key.startsWith(`${name}{`)) && chosen(key)) {
        const earlier = snapshots.length < 2 ? value : before.get(key) || 0;
        sum += value >= earlier ? value - earlier : value; // it began again: the service was started anew
      }
    }
    return sum;
  }

  // A gauge that each model has, of all of them.
  function together(name) {
    let sum = 0;
    for (const [key, value] of snapshots[snapshots.length - 1].values) if (key.startsWith(`${name}{`)) sum += value;
    return sum;
  }

  // The quantile of a histogram over the window, in seconds, as Prometheus interpolates it; none where nothing was observed.
  function quantile(name, share) {
    const counts = new Map();
    for (const key of snapshots[snapshots.length - 1].values.keys()) {
      if (!key.startsWith(`${name}_bucket{`)) continue;
      const bound = label(key, "le");
      if (!counts.has(bound)) counts.set(bound, gained(`${name}_bucket`, (one) => label(one, "le") === bound));
    }
    const buckets = [...counts].map(([bound, count]) => [bound === "+Inf" ? Infinity : Number(bound), count])
      .sort((one, other) => one[0] - other[0]);
    const total = buckets.length ? buckets[buckets.length - 1][1] : 0;
    if (!total) return null;
    let lower = 0, below = 0;
    for (const [bound, count] of buckets) {
      if (count >= share * total) {
        return bound === Infinity ? lower : lower + (bound - lower) * (share * total - below) / (count - below);
      }
      [lower, below] = [bound, count];
    }
    return lower;
  }

  const milliseconds = (seconds) => (seconds === null ? NONE
    : seconds < 1 ? `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(2)} s`);

  function stage(name) {
    const chosen = (key) => label(key, "stage") === name, count = gained("stage_seconds_count", chosen);
    return count ? milliseconds(gained("stage_seconds_sum", chosen) / count) : NONE;
  }

  function setHealth(kind, text) {
    byId("health").className = `badge ${kind}`;
    byId("health").textContent = text;
  }

  function showState() {
    const last = snapshots[snapshots.length - 1], now = last.values;
    const seconds = (last.at - snapshots[0].at) / 1000, scored = gained("items_total"), failed = gained("errors_total");
    const p50 = quantile("request_seconds", 0.5), p99 = quantile("request_seconds", 0.99);
    const figures = [
      ["waiting", `${now.get("waiting_items") || 0}`, `items, about ${now.get("waiting_tokens") || 0} tokens`],
      ["latency, median", milliseconds(p50), `99 %: ${milliseconds(p99)}`],
      ["queue, mean", stage("queue"), `in the model: ${stage("forward")}`],
      ["throughput", seconds ? `${(scored / seconds).toFixed(1)}` : NONE, "items a second"],
      ["refused", `${failed}`, "requests without scores"],
      ["replicas down", `${together("replicas_down")}`, "being brought back"],
    ];
    byId("state").replaceChildren(...figures.map(([name, value, note]) => element("div", { className: "figure" },
      element("span", { textContent: name }), element("b", { textContent: value }), element("span", { textContent: note }))));
    byId("state-note").textContent = seconds
      ? `Latency, throughput and refusals are of the last ${Math.round(seconds)} s, of all callers.`
      : "";
  }

  async function refresh() {
    if (document.hidden || refreshing) return;
    if (!open) { if (byId("login").hidden) enter(); return; }
    refreshing = true;
    try {
      const [ready, metrics] = await Promise.all([poll("ready"), poll("metrics")]);
      if (!open) return;
      if (metrics.status === 401) { askForToken("The service no longer knows the token."); return; }
      const about = await ready.text(), text = await metrics.text();
      const down = about ? JSON.parse(about).restarting : 0;
      if (!ready.ok) setHealth("bad", down ? `not ready: ${down} replicas restart` : "not ready");
      else setHealth("good", down ? `ready; ${down} replicas restart` : "ready");
      const at = performance.now();
      snapshots = [...snapshots.filter((one) => at - one.at <= WINDOW_MS), { at, values: readMetrics(text) }];
      showState();
    } catch (error) {
      if (open) setHealth("bad", "not reachable");
    } finally {
      refreshing = false;
    }
  }

  document.addEventListener("visibilitychange", refresh);
  setInterval(refresh, POLL_MS);

  addTurn("user");
  if (document.documentElement.dataset.asksForToken === "yes") askForToken(""); else enter();
})();
