"use strict";
const { rows, texts, colours } = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text");
const panel = document.getElementById("panel");
const details = document.getElementById("details");
const close = document.getElementById("close");
const tokens = Array.from(text.children);
const place = new Map(tokens.map((token, i) => [token, i]));
const hint = details.firstElementChild;
const part = document.getElementById("part");
const cells = Array.from(document.querySelectorAll(".cells span"));
let tabbable = 0; // the token that Tab reaches
let shown = -1; // the token in the panel
let pinned = false; // it stays when the mouse goes elsewhere
let returning = false; // the focus comes back from a closed panel

text.setAttribute("role", "listbox");
text.setAttribute("aria-label", "The text, token by token");
text.setAttribute("aria-orientation", "horizontal");
tokens.forEach((token, i) => {
  token.setAttribute("role", "option");
  token.setAttribute("aria-selected", "false");
  token.tabIndex = i === tabbable ? 0 : -1;
});

const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);
const percent = (p) => (p >= 0.1 ? (100 * p).toFixed(0) : p >= 1e-6 ? (100 * p).toPrecision(2) : "< 0.0001") + " %";
const verdict = (i) => ({ h: "Thinking hurt", z: "What was thought neither helped nor hurt", p: "What was thought helped" })[colours.effect[i][0]];

function make(tag, className, content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...[content ?? []].flat());
  return element;
}

// Text whose invisible characters stand between two marks, as nodes.
function nodes(marked) {
  return marked.split("\ue000").flatMap((part, i) => {
    if (!i) return part;
    const [sign, rest] = part.split("\ue001");
    return [make("i", "", sign), rest.replace("\n", "")];
  });
}

const tokenText = (id) => make("bdi", "token", nodes(texts[id] ?? ""));

// The token's own share of the text, spaces and all.
function ownText(i) {
  const parts = Array.from(tokens[i].cloneNode(true).childNodes);
  return parts.map((part) => (part.nodeType === Node.TEXT_NODE ? part.data.replace("\n", "").replaceAll(" ", "·") : part));
}

function topList(title, i, [ids, probabilities], surprise) {
  const own = rows[i][0];
  const line = (id, p, name) => {
    const share = make("span", "share");
    share.style.width = 100 * Math.min(1, p) + "%";
    const right = id === own;
    return make("li", right ? "right" : "", [share, make("span", "name", [make("bdi", "", name), right ? " ◂" : ""]), make("span", "percent", percent(p))]);
  };
  const lines = ids.map((id, k) => line(id, probabilities[k], nodes(texts[id] ?? "")));
  if (!ids.includes(own)) lines.push(line(own, Math.exp(-surprise), ownText(i)));
  return make("div", "", [make("h3", "", title), make("ol", "", lines)]);
}

// The parts of the gain from the surprise without a thought, with another one and with its own.
const gains = ([base, another, mixed]) => ({ content: another - mixed, mixing: base - another, gain: base - mixed });
const effect = ({ content, gain }) => Math.min(gain, Math.max(content, 0)); // as in tokens.py

function figures([base, another], thoughts, numbered) {
  const line = (tag, cells) => make("tr", "", cells.map((cell, k) => make(k ? tag : "th", "", cell)));
  const numbers = (surprise) => [percent(Math.exp(-surprise)), surprise.toFixed(2)];
  return make("table", "", [
    line("th", ["", "probability", "surprise", "weight"]),
    line("td", ["without thought", ...numbers(base), ""]),
    line("td", ["with another", ...numbers(another), ""]),
    ...thoughts.map(([weight, mixed], n) => line("td", [`with thought${numbered(n)}`, ...numbers(mixed), weight.toFixed(2)])),
  ]);
}

function describe(i) {
  const [id, surprise, thoughts, top] = rows[i];
  const head = [make("h2", "", make("bdi", "token", ownText(i))), make("p", "hint", `token ${i + 1} of ${tokens.length}, id ${id}`)];
  if (!surprise.length) return [...head, make("p", "", "The first token: nothing comes before it, so nothing predicts it.")];
  const [base] = surprise;
  const { content, mixing, gain } = gains(surprise);
  const numbered = (n) => (thoughts.length > 1 ? ` ${n + 1}` : "");
  return [
    ...head,
    make("p", "gain", `${verdict(i)}: ${signed(effect(gains(surprise)))} nats`),
    make("p", "hint", `content ${signed(content)} and mixing ${signed(mixing)} are a gain of ${signed(gain)}`),
    figures(surprise, thoughts, numbered),
    ...thoughts.flatMap(([, , ids], n) => [make("h3", "", `Thought${numbered(n)} before it`), make("p", "thought", ids.map(tokenText))]),
    make("div", "tops", [
      topList("Likeliest without", i, top, base),
      ...thoughts.map(([, mixed, , withIt], n) => topList(`With thought${numbered(n)}`, i, withIt, mixed)),
    ]),
  ];
}

function label(i) {
  const [, surprise] = rows[i];
  const name = tokens[i].textContent.trim() || "space";
  if (!surprise.length) return `${name}, the first token`;
  const [base, , mixed] = surprise;
  const { content, mixing } = gains(surprise);
  const change = `probability ${percent(Math.exp(-base))} to ${percent(Math.exp(-mixed))}`;
  return `${name}, ${verdict(i)}, content ${signed(content)} and mixing ${signed(mixing)} nats, ${change}`;
}

// Colour the text by one part of the gain, and count the colours in the legend.
function paint(name) {
  tokens.forEach((token, i) => { token.className = colours[name][i]; });
  for (const cell of cells) cell.textContent = colours[name].filter((colour) => colour === cell.className).length;
}

part.hidden = false;
part.addEventListener("change", (event) => paint(event.target.value));

function show(i) {
  if (i === shown) return;
  if (shown >= 0) tokens[shown].setAttribute("aria-selected", "false");
  shown = i;
  tokens[i].setAttribute("aria-selected", "true");
  tokens[i].setAttribute("aria-label", label(i));
  details.replaceChildren(...describe(i));
  panel.scrollTop = 0;
  document.body.classList.add("open");
}

function pin(i) {
  show(i);
  pinned = true;
  close.hidden = false;
}

function release() {
  pinned = false;
  close.hidden = true;
  if (shown >= 0) tokens[shown].setAttribute("aria-selected", "false");
  shown = -1;
  details.replaceChildren(hint);
  document.body.classList.remove("open");
}

function focus(i) {
  tokens[tabbable].tabIndex = -1;
  tabbable = i;
  tokens[i].tabIndex = 0;
  tokens[i].focus({ preventScroll: true });
  reveal(i);
}

// Scroll until the token stands clear of the panel, which on a phone covers the lower part.
function reveal(i) {
  const box = tokens[i].getBoundingClientRect();
  const sheet = getComputedStyle(panel).position === "fixed" ? panel.getBoundingClientRect().top : innerHeight;
  if (box.top < 0) scrollBy(0, box.top - 40);
  else if (box.bottom > sheet - 8) scrollBy(0, box.bottom - sheet + 40);
}

// The token nearest to this one's middle on the line above (step -1) or below (step 1).
function onNextLine(i, step) {
  const from = tokens[i].getClientRects()[0];
  const middle = (from.left + from.right) / 2;
  let best = i, least = Infinity, line = null;
  for (let k = i + step; k >= 0 && k < tokens.length; k += step) {
    const box = tokens[k].getClientRects()[0];
    if (!box || Math.abs(box.top - from.top) < from.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > box.height / 2) break;
    const distance = Math.abs((box.left + box.right) / 2 - middle);
    if (distance < least) [best, least] = [k, distance];
  }
  return best;
}

const tokenOf = (event) => place.get(event.target.closest?.("#text > span")) ?? -1;

text.addEventListener("pointerover", (event) => {
  const i = tokenOf(event);
  if (i >= 0 && event.pointerType === "mouse" && !pinned) show(i);
});
text.addEventListener("click", (event) => {
  const i = tokenOf(event);
  if (i < 0 || !getSelection().isCollapsed) return;
  pin(i);
  focus(i);
});
text.addEventListener("focusin", (event) => {
  const i = tokenOf(event);
  // A tap focuses too, before its click: a panel that opened now could cover the token, and the click would miss it.
  if (i >= 0 && !returning && event.target.matches(":focus-visible")) show(i);
});
text.addEventListener("keydown", (event) => {
  const i = tokenOf(event);
  if (i < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
  const last = tokens.length - 1;
  const moves = {
    ArrowRight: () => Math.min(last, i + 1), ArrowLeft: () => Math.max(0, i - 1), Home: () => 0, End: () => last,
    ArrowDown: () => onNextLine(i, 1), ArrowUp: () => onNextLine(i, -1),
  };
  if (moves[event.key]) focus(moves[event.key]());
  else if (event.key === "Enter" || event.key === " ") { pin(i); panel.focus({ preventScroll: true }); }
  else return;
  event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && shown >= 0) back();
});
close.addEventListener("click", back);

// Close the panel; the focus, where it was inside, goes back to the token.
function back() {
  const i = shown;
  const inside = panel.contains(document.activeElement);
  release();
  if (!inside) return;
  returning = true;
  tokens[i].focus({ preventScroll: true });
  returning = false;
}
