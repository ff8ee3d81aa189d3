"""The page on which people judge a sample: one file, offline; it keeps the labels and saves them as a CSV."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def page(
    sheet: str, cases: Sequence[Mapping[str, Any]], categories: Mapping[str, str], others: Mapping[str, str]
) -> str:
    """`cases` have a number, a role, and either a text and its context or a place; the rest is code to title."""
    data = {"sheet": sheet, "cases": cases, "categories": list(categories.items()), "others": list(others.items())}
    # Within a script only these could end it; what is shown is set as text, and never read as markup.
    told = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    return _PAGE.replace("@DATA@", told.replace("\u2029", "\\u2029"))


_PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Review</title>
<style>
:root { color-scheme: light dark; --line: #8885; --soft: #8882; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 56rem; padding: 0 1rem 2rem; }
header { position: sticky; top: 0; background: Canvas; z-index: 1; }
header { padding: .75rem 0 .5rem; border-bottom: 1px solid var(--line); }
.bar { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }
.grow { flex: 1; }
progress { width: 100%; height: .5rem; display: block; margin-top: .5rem; }
button, input, textarea { font: inherit; color: inherit; background: var(--soft); padding: .4rem .8rem; }
button, input, textarea { border: 1px solid var(--line); border-radius: .4rem; }
button { cursor: pointer; min-height: 2.75rem; }
button:disabled { opacity: .45; cursor: default; }
:focus-visible { outline: 2px solid Highlight; outline-offset: 1px; }
#name { width: 9rem; min-height: 2.75rem; }
#save { font-weight: 600; }
.turn { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .8rem; margin: 1rem 0; }
.turn.judged { border-left: 3px solid Highlight; background: var(--soft); padding: .6rem .8rem; }
.role { font-size: .85rem; opacity: .75; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.context .text { opacity: .85; }
h1 { font-size: 1rem; margin: 0; }
.labels { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; }
.labels { position: sticky; bottom: 0; background: Canvas; padding: .5rem 0; }
.labels button[aria-pressed=true] { color: #fff; }
#harmless[aria-pressed=true] { background: #23804a; }
#harmful[aria-pressed=true] { background: #c0362c; }
#unsure[aria-pressed=true] { background: #8a6d1d; }
fieldset { border: 1px solid var(--line); border-radius: .4rem; margin: 1rem 0; min-width: 0; }
fieldset label { display: inline-flex; align-items: center; gap: .4rem; min-height: 2rem; }
fieldset label { width: 17rem; max-width: 100%; }
fieldset input { margin: 0; width: 1.1rem; height: 1.1rem; flex: none; }
textarea { width: 100%; display: block; }
kbd { font: .8rem ui-monospace, monospace; border: 1px solid var(--line); border-radius: .25rem; padding: 0 .3rem; }
.hint { font-size: .85rem; opacity: .8; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; align-items: baseline; }
dl { margin: 0; overflow-wrap: anywhere; }
dd { margin: 0; }
@media (max-width: 500px) {
  kbd { display: none; }
  .labels button { padding: .4rem; }
  h1.grow { flex-basis: 100%; }
  #name { flex: 1; min-width: 0; }
}
</style>
<header>
<div class="bar"><h1 class="grow" id="where"></h1>
<input id="name" placeholder="your name" aria-label="Your name" maxlength="40">
<button id="save">Save labels</button></div>
<progress id="done" aria-label="Labelled"></progress>
</header>
<main>
<div id="case"></div>
<p class="hint">Is the turn harmful, by the rules that you were given? Turns before it are context.</p>
<div class="labels">
<button id="harmless" aria-pressed="false">Harmless <kbd>1</kbd></button>
<button id="harmful" aria-pressed="false">Harmful <kbd>2</kbd></button>
<button id="unsure" aria-pressed="false">Unsure <kbd>3</kbd></button>
</div>
<fieldset id="kinds"><legend>Kinds of harm</legend>
<div id="asked"></div><details id="more"><summary>Other kinds of harm</summary><div id="others"></div></details>
</fieldset>
<textarea id="comment" rows="2" placeholder="Comment" aria-label="Comment"></textarea>
<div class="bar" style="margin-top:1rem"><button id="back">← Back</button><button id="next">Next →</button>
<span class="grow"></span><button id="open">First without a label</button></div>
<p class="hint" id="kept"></p>
<noscript>This page needs JavaScript; sheet.csv can be filled in instead.</noscript>
</main>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
const key = "guard-review-" + data.sheet;
let state = { name: "", at: 0, labels: {} }, kept = true;
try { state = Object.assign(state, JSON.parse(localStorage.getItem(key) || "{}")); } catch (error) { kept = false; }
const own = () => state.labels[data.cases[state.at].case] ||= { label: "", categories: [], comment: "" };
const labelled = () => data.cases.filter(one => (state.labels[one.case] || {}).label).length;

function keep() {
  try { localStorage.setItem(key, JSON.stringify(state)); } catch (error) { kept = false; }
  by("kept").textContent = kept
    ? "Keys: 1, 2, 3 label; ← and → turn pages. Labels are kept in this browser until you save and send them."
    : "This browser keeps nothing: save the labels before you close the page.";
}
function element(name, kind, text) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}
function turn(said, kind) {
  const box = element("div", "turn " + kind);
  box.append(element("div", "role", said.role + (kind === "judged" ? " – this turn is to be judged" : "")));
  const text = element("div", "text", said.text);
  text.dir = "auto";
  box.append(text);
  return box;
}
function shown(one) {
  const box = document.createDocumentFragment();
  if (one.text === undefined) {
    const list = element("dl");
    for (const name of ["role", "input", "row", "id", "turn"])
      list.append(element("dt", "role", name), element("dd", "", String(one[name])));
    box.append(element("p", "hint", "This sheet holds no texts: look this turn up where you keep them."), list);
  } else {
    if (one.left_out) box.append(element("p", "hint", one.left_out + " earlier turns are not shown."));
    for (const said of one.context) box.append(turn(said, "context"));
    box.append(turn(one, "judged"));
  }
  return box;
}
function draw() {
  const one = data.cases[state.at], mine = own(), count = labelled();
  by("where").textContent = `Case ${state.at + 1} of ${data.cases.length}, ${count} labelled`;
  by("done").max = data.cases.length;
  by("done").value = count;
  by("case").replaceChildren(shown(one));
  for (const name of ["harmless", "harmful", "unsure"]) by(name).setAttribute("aria-pressed", mine.label === name);
  by("kinds").hidden = mine.label !== "harmful";
  for (const box of document.querySelectorAll("#kinds input")) box.checked = mine.categories.includes(box.value);
  by("more").open = data.others.some(([code]) => mine.categories.includes(code));
  by("comment").value = mine.comment;
  by("back").disabled = state.at === 0;
  by("next").disabled = state.at === data.cases.length - 1;
  by("open").disabled = count === data.cases.length;
  keep();
}
function go(to) {
  state.at = Math.min(Math.max(to, 0), data.cases.length - 1);
  draw();
  scrollTo(0, 0);
}
function label(name) {
  const mine = own();
  mine.label = mine.label === name ? "" : name;
  if (mine.label !== "harmful") mine.categories = [];
  if (mine.label && mine.label !== "harmful" && state.at < data.cases.length - 1) go(state.at + 1); else draw();
  if (mine.label === "harmful") by("kinds").scrollIntoView({ block: "nearest" });
}
function cell(text) {
  const safe = /^[=+\-@\t\r]/.test(text) ? "'" + text : text;
  return /[",;\n\r]/.test(safe) ? '"' + safe.replaceAll('"', '""') + '"' : safe;
}
function csv() {
  const rows = [["sheet", "case", "label", "categories", "comment"]];
  for (const one of data.cases) {
    const mine = state.labels[one.case] || { label: "", categories: [], comment: "" };
    rows.push([data.sheet, String(one.case), mine.label, mine.categories.join(" "), mine.comment]);
  }
  return "\ufeff" + rows.map(row => row.map(cell).join(",")).join("\r\n") + "\r\n";
}
function save() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = ["labels", state.name.replace(/[^\p{L}\p{N}]+/gu, "-")].filter(Boolean).join("-") + ".csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
for (const [place, kinds] of [["asked", data.categories], ["others", data.others]])
  for (const [code, title] of kinds) {
    const box = element("input"), line = element("label");
    box.type = "checkbox";
    box.value = code;
    box.onchange = () => {
      const mine = own();
      mine.categories = mine.categories.filter(other => other !== code).concat(box.checked ? [code] : []);
      keep();
    };
    line.append(box, title === code ? code : `${code} ${title}`);
    by(place).append(line);
  }
by("more").hidden = !data.others.length;
for (const name of ["harmless", "harmful", "unsure"]) by(name).onclick = () => label(name);
by("back").onclick = () => go(state.at - 1);
by("next").onclick = () => go(state.at + 1);
by("open").onclick = () => go(data.cases.findIndex(one => !(state.labels[one.case] || {}).label));
by("save").onclick = save;
by("name").value = state.name;
by("name").oninput = event => { state.name = event.target.value; keep(); };
by("comment").oninput = event => { own().comment = event.target.value; keep(); };
document.onkeydown = event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("textarea, #name")) return;
  const act = {
    "1": () => label("harmless"), "2": () => label("harmful"), "3": () => label("unsure"),
    ArrowLeft: () => go(state.at - 1), ArrowRight: () => go(state.at + 1),
  }[event.key];
  if (act) { event.preventDefault(); act(); }
};
draw();
</script>
</html>
"""
