// Shows what /api/v1/overview says, as long as somebody looks. Text from the agent reaches the page by textContent only.
"use strict";

const URL_OF_OVERVIEW = "/api/v1/overview";
const PERIOD_MS = 1000;
const ANSWER_LIMIT_MS = 3000;
/** Rows in the table, the worst and the busiest; hosts in the picture. */
const MOST_ROWS = 200;
const MOST_IN_PICTURE = 12;
/** Rates that a sparkline is drawn of. */
const MOST_RATES = 60;

/** As `flannel-agent peers` names them, the worst first, and how they are marked. */
const STATES = {
  noRoute: ["no route", "bad"],
  notOnLink: ["not on link", "bad"],
  unresolved: ["unresolved", "bad"],
  held: ["held", "warning"],
  silent: ["silent", "warning"],
  direct: ["direct", "good"],
  ok: ["ok", "good"],
};
const ORDER = Object.keys(STATES);

const element = (id) => document.getElementById(id);

/** An element with a class and a text. */
function make(name, className = "", text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function makeSvg(name, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function number(value, unit) {
  const prefixes = ["", "k", "M", "G", "T"];
  let index = 0;
  while (value >= 999.5 && index + 1 < prefixes.length) {
    value /= 1000;
    index += 1;
  }
  const digits = value === 0 || value >= 99.5 ? 0 : value >= 9.95 ? 1 : 2;
  return `${index === 0 ? Math.round(value * 10) / 10 : value.toFixed(digits)} ${prefixes[index]}${unit}`;
}

function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.floor(seconds)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h`;
}

/** A counter of packets and bytes, its rates, and those that were. */
class Rates {
  constructor() {
    this.packets = null;
    this.bits = null;
    this.history = [];
    this.last = null;
  }

  /** A counter that went backwards began anew. */
  update(count, elapsedMs) {
    const { last } = this;
    this.last = count && { ...count, elapsedMs };
    const seconds = last && count ? (elapsedMs - last.elapsedMs) / 1000 : 0;
    const known = seconds > 0 && count.packets >= last.packets && count.bytes >= last.bytes;
    this.packets = known ? (count.packets - last.packets) / seconds : null;
    this.bits = known && count.bytes !== null ? ((count.bytes - last.bytes) * 8) / seconds : null;
    if (known) this.history.push(this.bits ?? this.packets);
    if (this.history.length > MOST_RATES) this.history.shift();
  }

  /** The paths of a sparkline and of what is below it. */
  paths() {
    const most = Math.max(...this.history);
    if (this.history.length < 2 || most <= 0) return ["", ""];
    const x = (index) => (100 - (this.history.length - 1 - index) * (100 / (MOST_RATES - 1))).toFixed(1);
    const line = this.history.map((rate, index) => `${x(index)},${(20.5 - (rate / most) * 18).toFixed(1)}`).join("L");
    return [`M${line}`, `M${line}L100,22L${x(0)},22Z`];
  }
}

/** A cell of bits/s with packets/s below, and one of a sparkline. */
class RateCells {
  constructor(className) {
    this.bits = make("span");
    this.packets = make("span", "second muted");
    const rates = make("td", "number");
    rates.append(this.bits, this.packets);
    const cell = make("td", className);
    const picture = makeSvg("svg", { class: "spark", viewBox: "0 0 100 22", preserveAspectRatio: "none", "aria-hidden": "true" });
    this.line = makeSvg("path", { class: "line" });
    this.area = makeSvg("path", { class: "area" });
    picture.append(this.area, this.line);
    cell.append(picture);
    this.cells = [rates, cell];
  }

  show(rates) {
    setText(this.bits, rates.bits === null ? "" : number(rates.bits, "bit/s"));
    setText(this.packets, rates.packets === null ? "–" : number(rates.packets, "pkt/s"));
    const [line, area] = rates.paths();
    this.line.setAttribute("d", line);
    this.area.setAttribute("d", area);
  }
}

/** A peer, with its row once it has one. */
class Peer {
  constructor() {
    this.sent = new Rates();
    this.received = new Rates();
    this.row = null;
  }

  update(told, elapsedMs) {
    this.told = told;
    this.sent.update(told.sent, elapsedMs);
    this.received.update(told.received, elapsedMs);
    // By powers of four, so that rows stay where they are while the rates vary.
    this.bits = (this.sent.bits ?? 0) + (this.received.bits ?? 0);
    this.rank = Math.round(Math.log2(this.bits + 1) / 2);
    this.severity = ORDER.indexOf(told.state) + (told.reason === "" ? 0.5 : 0);
    this.text = null;
  }

  get mark() {
    return (STATES[this.told.state] ?? ["", "bad"])[1];
  }

  matches(words, address) {
    if (address !== null && contains(this.told.subnet, address)) return true;
    const { subnet, state, address: vtep, vtepMac, nextHop, interface: device, reason } = this.told;
    this.text ??= [subnet, vtep, vtepMac, nextHop, device, reason, (STATES[state] ?? [state])[0]].join(" ").toLowerCase();
    return words.every((word) => this.text.includes(word));
  }

  show() {
    const { told } = this;
    this.row ??= this.makeRow();
    const { pill, why, subnet, vtep, heard, sent, received } = this.cells;
    const [label, mark] = STATES[told.state] ?? [told.state, "bad"];
    this.row.dataset.state = told.state;
    pill.className = `pill ${mark}`;
    setText(pill, label);
    setText(why, told.reason);
    why.hidden = told.reason === "";
    setText(subnet, told.subnet);
    setText(vtep, told.address);
    vtep.title = `MAC ${told.vtepMac}, next hop ${told.nextHop ?? "by flow"} on ${told.interface ?? "no interface"}`;
    setText(heard, told.lastHeardMs === null ? "never" : `${duration(told.lastHeardMs / 1000)} ago`);
    sent.show(this.sent);
    received.show(this.received);
    return this.row;
  }

  makeRow() {
    const row = make("tr");
    row.dataset.subnet = this.told.subnet;
    const state = make("td");
    const cells = { pill: make("span", "pill"), why: make("span", "why"), subnet: make("td"), vtep: make("td"), heard: make("td"), sent: new RateCells("sent"), received: new RateCells("received") };
    state.append(cells.pill, cells.why);
    row.append(state, cells.subnet, cells.vtep, cells.heard, ...cells.sent.cells, ...cells.received.cells);
    this.cells = cells;
    return row;
  }
}

/** The bits of an IPv4 address, or null. */
function bitsOf(text) {
  const parts = /^(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})$/.exec(text)?.slice(1).map(Number);
  return parts?.every((part) => part < 256) ? parts.reduce((bits, part) => bits * 256 + part, 0) : null;
}

function contains(subnet, address) {
  const [first, length] = subnet.split("/");
  const size = 2 ** (32 - Number(length));
  return Math.floor(bitsOf(first) / size) === Math.floor(address / size);
}

/** A reason of drops. */
class Reason {
  constructor(told) {
    this.rates = new Rates();
    this.row = make("tr");
    this.row.dataset.reason = told.reason;
    const name = make("td", "wide");
    name.append(make("code", "", told.reason), make("span", "why", told.description));
    this.packets = make("td", "number");
    this.cells = new RateCells("dropped");
    this.latest = make("td", "wide muted");
    this.row.append(name, this.packets, ...this.cells.cells, this.latest);
  }

  show(told, elapsedMs) {
    this.rates.update(told, elapsedMs);
    setText(this.packets, told.packets.toLocaleString("en"));
    this.cells.show(this.rates);
    setText(this.latest, told.latest === null ? "" : `${duration(told.latest.ageMs / 1000)} ago: ${told.latest.summary}`);
  }
}

/** An overlay of this host's agent. */
class Overlay {
  constructor() {
    this.root = element("overlay").content.firstElementChild.cloneNode(true);
    this.peers = new Map();
    this.reasons = new Map();
    this.find = (selector) => this.root.querySelector(selector);
    this.find("input").addEventListener("input", () => this.showPeers());
  }

  update(told, elapsedMs) {
    this.told = told;
    this.showHost();
    const known = this.peers;
    this.peers = new Map();
    for (const peer of told.peers ?? []) {
      const entry = known.get(peer.subnet) ?? new Peer();
      entry.update(peer, elapsedMs);
      this.peers.set(peer.subnet, entry);
    }
    this.sorted = [...this.peers.values()].sort((a, b) => a.severity - b.severity || b.rank - a.rank);
    this.showPeers();
    this.showPicture();
    this.showDrops(elapsedMs);
  }

  showHost() {
    const { name, network, lease, publicIp, interface: device, mtu, backend, store } = this.told;
    setText(this.find(".this-host h2"), name);
    const following = `${store.following ? "followed" : "away"} for ${duration(Math.max(0, Date.now() / 1000 - store.since))}`;
    const rows = {
      Lease: `${lease.subnet}, ${lease.state.replace("_", " ")}`,
      Network: `${network}, MTU ${mtu}`,
      Address: `${publicIp} on ${device}`,
      MAC: lease.vtepMac,
      Backend: backend,
      [store.kind]: following,
    };
    this.find("dl").replaceChildren(...Object.entries(rows).flatMap(([term, text]) => [make("dt", "", term), make("dd", "", text)]));
  }

  showPeers() {
    const filter = this.find("input").value.trim().toLowerCase();
    const [words, address] = [filter.split(/\s+/), bitsOf(filter)];
    const matching = filter === "" ? this.sorted : this.sorted.filter((peer) => peer.matches(words, address));
    const shown = matching.slice(0, MOST_ROWS);
    const rows = shown.map((peer) => peer.show());
    const body = this.find(".peers tbody");
    if (rows.length !== body.children.length || rows.some((row, index) => body.children[index] !== row)) body.replaceChildren(...rows);
    const hidden = matching.length - shown.length;
    const counts = ORDER.map((state) => [this.sorted.filter((peer) => peer.told.state === state).length, STATES[state][0]]);
    const words_of_counts = counts.filter(([count]) => count > 0).map(([count, label]) => `${count.toLocaleString("en")} ${label}`);
    setText(this.find(".counts"), words_of_counts.join(", "));
    let more = hidden > 0 ? `and ${hidden.toLocaleString("en")} more with less trouble and traffic` : "";
    if (this.told.peers === null) more = "The backend keeps no peers in the kernel's maps, or they can't be read.";
    else if (this.sorted.length === 0) more = "There are no peers.";
    else if (matching.length === 0) more = "No peer matches.";
    setText(this.find(".more"), more);
  }

  /** This host in the middle, and around it those with most trouble and traffic, each where it was. */
  showPicture() {
    const picture = this.find(".picture");
    const shown = this.sorted.slice(0, MOST_IN_PICTURE);
    shown.sort((a, b) => a.told.subnet.localeCompare(b.told.subnet, "en", { numeric: true }));
    const [middle, radii] = [[380, 165], [290, 132]];
    const [lines, rates, hosts] = [[], [], []];
    shown.forEach((peer, index) => {
      const angle = (2 * Math.PI * (index + 0.5)) / shown.length - Math.PI;
      const [x, y] = [middle[0] + radii[0] * Math.cos(angle), middle[1] + radii[1] * Math.sin(angle)];
      const mark = peer.mark === "good" ? "" : peer.mark;
      const width = peer.bits > 0 ? Math.min(12, 1.5 + 1.6 * Math.log10(1 + peer.bits / 1000)) : 1.5;
      const line = makeSvg("g", { class: mark });
      line.append(makeSvg("line", { x1: middle[0], y1: middle[1], x2: x, y2: y, "stroke-width": width, class: peer.bits > 0 ? "busy" : "" }));
      if (peer.bits > 0) rates.push(this.rate(middle[0] + (x - middle[0]) * 0.54, middle[1] + (y - middle[1]) * 0.54, number(peer.bits, "bit/s")));
      lines.push(line);
      hosts.push(this.host(x, y, peer.told.subnet, peer.told.address, mark));
    });
    const own = this.host(...middle, this.told.lease.subnet, this.told.publicIp, "own");
    const rest = this.sorted.length - shown.length;
    const more = makeSvg("text", { class: "rest", x: 752, y: 322 }, rest > 0 ? `and ${rest.toLocaleString("en")} more` : "");
    picture.setAttribute("aria-label", `this host and ${shown.length} of its ${this.sorted.length} peers`);
    picture.replaceChildren(...lines, ...rates, ...hosts, own, more);
  }

  rate(x, y, text) {
    const rate = makeSvg("g", { class: "rate" });
    const width = text.length * 6.4 + 8;
    rate.append(makeSvg("rect", { x: x - width / 2, y: y - 8, width, height: 16, rx: 4 }), makeSvg("text", { x, y: y + 4 }, text));
    return rate;
  }

  host(x, y, subnet, address, className) {
    const host = makeSvg("g", { class: className });
    const box = makeSvg("rect", { x: x - 62, y: y - 19, width: 124, height: 38, rx: 7 });
    const second = makeSvg("text", { x, y: y + 13, class: className === "own" ? "" : "address" }, address);
    host.append(box, makeSvg("text", { x, y: y - 2 }, subnet), second);
    return host;
  }

  showDrops(elapsedMs) {
    const drops = this.told.drops.filter((drop) => drop.packets > 0).sort((a, b) => b.packets - a.packets);
    for (const drop of drops) {
      if (!this.reasons.has(drop.reason)) this.reasons.set(drop.reason, new Reason(drop));
      this.reasons.get(drop.reason).show(drop, elapsedMs);
    }
    const rows = drops.map((drop) => this.reasons.get(drop.reason).row);
    this.find(".drops tbody").replaceChildren(...rows);
    this.find(".drops .scroll").hidden = rows.length === 0;
    this.find(".drops .none").hidden = rows.length > 0;
  }
}

/** What is shown, by whom, and when it was told. */
const shown = { overlays: new Map(), agent: "", elapsedMs: -1, answered: null, host: "flannel" };

function show(overview) {
  const agent = `${overview.pid} ${overview.started}`;
  // Rates of one agent's clock say nothing of another's.
  if (agent !== shown.agent) {
    shown.overlays.clear();
    shown.agent = agent;
    shown.elapsedMs = -1;
  }
  shown.answered = new Date();
  showVerdict(overview);
  // Another viewer had it read, and it was shown already.
  if (overview.elapsedMs === shown.elapsedMs) return;
  shown.elapsedMs = overview.elapsedMs;
  const [first] = overview.overlays;
  shown.host = overview.host || first?.publicIp || "flannel";
  setText(element("host"), shown.host);
  setText(element("agent"), `flannel-agent ${overview.version}, process ${overview.pid}, running for ${duration(overview.elapsedMs / 1000)}`);
  const known = shown.overlays;
  shown.overlays = new Map();
  for (const told of overview.overlays) {
    const overlay = known.get(told.vni) ?? new Overlay();
    shown.overlays.set(told.vni, overlay);
    if (overlay.root.parentNode === null) element("overlays").append(overlay.root);
    overlay.update(told, overview.elapsedMs);
  }
  const roots = [...shown.overlays.values()].map((overlay) => overlay.root);
  for (const root of [...element("overlays").children]) if (!roots.includes(root)) root.remove();
}

function showVerdict(overview) {
  const several = overview.overlays.length > 1;
  const waits = overview.waiting.map((waiting) => `the agent has no lease yet, and has waited for ${duration(Math.max(0, Date.now() / 1000 - waiting.since))}: ${waiting.reason}`);
  const troubles = overview.overlays.flatMap((overlay) => overlay.troubles.map((trouble) => (several ? `${overlay.name}: ${trouble}` : trouble)));
  const all = [...overview.troubles, ...waits, ...troubles];
  let words = "all is well";
  if (all.length > 0) words = "look at";
  else if (!overview.isWell) words = "the agent has just begun, and has no overlay yet";
  element("verdict").className = `card ${overview.isWell ? "well" : all.length > 0 ? "trouble" : ""}`;
  element("verdict").hidden = false;
  setText(element("well"), words);
  const items = [...element("troubles").children];
  if (items.length !== all.length || items.some((item, index) => item.textContent !== all[index])) element("troubles").replaceChildren(...all.map((trouble) => make("li", "", trouble)));
  document.title = `${all.length > 0 ? `(${all.length}) ` : ""}${shown.host} – flannel`;
}

function showLive() {
  document.body.className = "live";
  element("stale").hidden = true;
  setText(element("connection"), `live, ${shown.answered.toLocaleTimeString("en-GB")}`);
}

/** Nothing is shown as current that is not. */
function showStale() {
  document.body.className = "stale";
  const since = shown.answered;
  const seconds = since && (Date.now() - since.getTime()) / 1000;
  const words = since === null ? "The agent does not answer." : `The agent has not answered since ${since.toLocaleTimeString("en-GB")}, for ${duration(seconds)}. Everything below was so then.`;
  setText(element("stale"), words);
  element("stale").hidden = false;
  setText(element("connection"), "no answer");
  if (since !== null) {
    element("verdict").className = "card";
    setText(element("well"), "not known: the agent does not answer");
    element("troubles").replaceChildren();
    document.title = `(?) ${shown.host} – flannel`;
  }
}

/** One request at a time, and none while nobody looks. */
async function follow() {
  for (;;) {
    if (document.hidden) {
      await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
      if (shown.answered !== null && Date.now() - shown.answered.getTime() > ANSWER_LIMIT_MS) showStale();
      continue;
    }
    try {
      const response = await fetch(URL_OF_OVERVIEW, { signal: AbortSignal.timeout(ANSWER_LIMIT_MS) });
      if (!response.ok) throw new Error(`the agent answers ${response.status}`);
      show(await response.json());
      showLive();
    } catch (error) {
      console.warn(error);
      showStale();
    }
    await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
  }
}

follow();
