"""How a report looks: its style sheet, and the script that draws its charts in the colours of that.

The colours of series are those of Okabe and Ito, which people tell apart however they see colours.
"""

STYLE = """
/* The page in the light */
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1c2024; --soft: #5b6570; --line: #dfe3e8; --wash: #f5f7f9;
  --accent: #0b6fb8; --band: rgba(11, 111, 184, .18); --note: #fff5dc; --noteline: #d98c00;
  --flag: #d98c00; --redirect: #4aa3df; --block: #c44500; --milder: #009e73;
  --seriesa: #0072b2; --seriesb: #e69f00; --seriesc: #009e73; --seriesd: #cc79a7;
  --seriese: #56b4e9; --seriesf: #d55e00; --seriesg: #8a939c;
}
/* and in the dark, but for paper */
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e6e9ec; --soft: #9aa4ae; --line: #343b42; --wash: #1d2226;
    --accent: #5ab4f0; --band: rgba(90, 180, 240, .25); --note: #2e2716; --noteline: #f0b23c;
    --flag: #f0b23c; --redirect: #7cc4f2; --block: #f07c3e; --milder: #2fc59b;
    --seriesa: #3d9fdc; --seriesc: #2fb98f; --seriesd: #d98fb8; --seriesf: #ef7d35; --seriesg: #77818a;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 60rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
section, header { min-width: 0; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .6rem 0 .2rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line);
  scroll-margin-top: 3.2rem; }
h3, figcaption { font-size: 1rem; font-weight: 600; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.subtitle, small, summary small { color: var(--soft); }
.note { background: var(--note); border-left: 4px solid var(--noteline); padding: .5rem .8rem; border-radius: 4px; }
nav { position: sticky; top: 0; z-index: 2; display: flex; gap: .2rem; overflow-x: auto; padding: .45rem .6rem;
  background: var(--paper); border-bottom: 1px solid var(--line); scrollbar-width: thin; }
nav a { flex: none; padding: .2rem .6rem; border-radius: 1rem; color: var(--soft); text-decoration: none;
  font-size: .88rem; }
nav a:hover, nav a:focus-visible { background: var(--wash); color: var(--ink); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(12rem, 44%), 1fr)); gap: .6rem;
  margin: 1.2rem 0; }
.tile { background: var(--wash); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .86rem; }
.table { overflow-x: auto; max-width: 100%; margin: .6rem 0 1.2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .38rem .6rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align:
  top; font-weight: 400;
  overflow-wrap: anywhere; min-width: 4rem; }
thead th { color: var(--soft); font-size: .82rem; vertical-align: bottom; overflow-wrap: normal; }
tbody th { min-width: 7rem; }
td.number { min-width: 3rem; }
.cards td { min-width: 7.6rem; }
.number { text-align: right; overflow-wrap: normal; }
tbody .number { white-space: nowrap; }
.share { min-width: 11rem; }
.bar { display: block; position: relative; height: 6px; margin-top: 3px; background: var(--wash); border-radius:
  3px; }
.bar b { position: absolute; left: 0; top: 0; height: 6px; background: var(--accent); opacity: .55; border-radius:
  3px; }
.bar i { position: absolute; top: 2px; height: 2px; min-width: 2px; background: var(--ink); }
.heat { background: color-mix(in srgb, var(--accent) calc(var(--heat) * .45), transparent); padding-right: .6rem; }
details { margin: .8rem 0; border: 1px solid var(--line); border-radius: 8px; padding: .5rem .8rem; }
summary { cursor: pointer; font-weight: 600; }
details .table { max-height: 32rem; overflow: auto; }
figure { margin: 1rem 0; }
.chart { width: 100%; }
.picker { display: block; margin: .4rem 0; font-size: .9rem; }
select { font: inherit; max-width: 100%; padding: .3rem; color: inherit; background: var(--wash); border: 1px
  solid var(--line); border-radius: 6px; }
@media (max-width: 40rem) {
  h1 { font-size: 1.4rem; }
  .cards thead { display: none; }
  .cards tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--line); }
  .cards th, .cards td { display: grid; grid-template-columns: 6.5rem 1fr; gap: .5rem; border: 0; padding: .1rem
    0; text-align: left; }
  .cards th::before, .cards td::before { content: attr(data-label); color: var(--soft); }
  table { font-size: .84rem; }
  .share { min-width: 6.6rem; }
  .share small { display: block; }
  .cards .number { white-space: normal; }
}
@media print {
  nav, .picker { display: none; }
  main { max-width: none; padding: 0; }
  .table, details .table { overflow: visible; max-height: none; }
  tr, figure { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""

SCRIPT = """
"use strict";
const figures = document.getElementById("figures").textContent;
const config = { displaylogo: false, displayModeBar: false, responsive: true };
const picked = {};
function draw(only) {
  const style = getComputedStyle(document.documentElement);
  const coloured = figures.replace(/var\\((--[a-z]+)\\)/g, (_, name) => style.getPropertyValue(name).trim());
  for (const [name, choices] of Object.entries(JSON.parse(coloured))) {
    if (only && only !== name) continue;
    const box = document.getElementById(name);
    const figure = choices[picked[name] || 0];
    figure.layout.font.family = getComputedStyle(document.body).fontFamily;
    box.style.minHeight = figure.layout.height + "px";
    Plotly.react(box, figure.data, figure.layout, config);
  }
}
draw();
for (const select of document.querySelectorAll("select")) {
  select.addEventListener("change", () => { picked[select.dataset.of] = +select.value; draw(select.dataset.of); });
}
for (const query of ["(prefers-color-scheme: dark)", "print"]) {
  matchMedia(query).addEventListener("change", () => draw());
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
"""
