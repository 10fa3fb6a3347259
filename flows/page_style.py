"""The style sheet of the page. Colours are Okabe and Ito's, told apart by most colour-blind eyes."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --panel: #ffffff; --ink: #1b1f24; --quiet: #57606a; --line: #d5d9de; --shade: #f0f2f4;
  --c0: #0072b2; --c1: #b85000; --c2: #007a5a; --c3: #a0508a; --link: #005a9c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --panel: #1c2026; --ink: #e6e8ea; --quiet: #a3abb5; --line: #3a414a; --shade: #242a31;
    --c0: #62b6f0; --c1: #f0a030; --c2: #35c49a; --c3: #e59cc8; --link: #7cc4ff;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; overflow-wrap: break-word;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
}
main, header, footer { max-width: 1400px; margin: 0 auto; padding: 0 14px; }
header { padding-top: 22px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.25rem; margin: 42px 0 6px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 22px 0 6px; }
h4 { font-size: 0.95rem; margin: 18px 0 4px; }
p, ul, ol { margin: 6px 0; max-width: 80ch; }
a { color: var(--link); }
.quiet, figcaption, .empty, footer { color: var(--quiet); font-size: 0.9rem; }
code, pre { font: 0.86em/1.45 ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--shade); padding: 8px 10px;
  border-radius: 6px; margin: 6px 0; }
nav { margin: 12px 0 0; font-size: 0.9rem; display: flex; flex-wrap: wrap; gap: 2px 14px; }
.tiles { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 215px), 1fr));
  margin: 18px 0 0; padding: 0; list-style: none; max-width: none; }
.tiles li { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.tiles .label, .tiles .note { display: block; color: var(--quiet); font-size: 0.83rem; line-height: 1.35; }
.tiles .value { display: block; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.box { overflow-x: auto; margin: 8px 0; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--line); color: var(--quiet); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 600; }
table.numbers th:not(:first-child), table.numbers td { text-align: right; white-space: nowrap; }
td small, th small { display: block; color: var(--quiet); font-size: 0.92em; font-weight: 400; }
tr.first-of-group > * { border-top: 2px solid var(--line); }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
.pair { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  align-items: start; }
.pair > *, .charts > * { min-width: 0; }
figure { margin: 8px 0; background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 10px 6px; min-width: 0; }
figure h3 { margin: 0 0 4px; font-size: 0.95rem; }
figcaption { margin-top: 4px; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
svg { display: block; width: 100%; height: auto; }
svg.chart { max-width: 580px; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
  fill: var(--ink); font-variant-numeric: tabular-nums; }
svg text.tick, svg text.name { fill: var(--quiet); }
svg text.halo { paint-order: stroke; stroke: var(--panel); stroke-width: 3px; stroke-linejoin: round; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--quiet); stroke-width: 1; fill: none; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.mark { stroke: var(--panel); stroke-width: 1; }
.bar { stroke-width: 5; stroke-linecap: round; opacity: 0.45; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); stroke-dasharray: 6 3; }
.s2 { stroke: var(--c2); stroke-dasharray: 2 3; } .s3 { stroke: var(--c3); stroke-dasharray: 9 3 2 3; }
.mark.s0 { fill: var(--c0); } .mark.s1 { fill: var(--c1); }
.mark.s2 { fill: var(--c2); } .mark.s3 { fill: var(--c3); }
.mark.s0, .mark.s1, .mark.s2, .mark.s3 { stroke: var(--panel); stroke-dasharray: none; }
.bar.s0, .bar.s1 { stroke-dasharray: none; }
.whisker { stroke: var(--quiet); stroke-width: 1.5; }
.lead { stroke: var(--quiet); stroke-width: 0.8; }
.front { fill: none; stroke: var(--c0); stroke-width: 1.5; stroke-dasharray: 4 3; }
.dot.on { fill: var(--c0); stroke: var(--panel); stroke-width: 1; }
.dot.off { fill: var(--panel); stroke: var(--c1); stroke-width: 2; }
svg.graph.across { display: none; }
svg.graph.down { max-width: 460px; margin: 0 auto; }
@media (min-width: 1100px) { svg.graph.across { display: block; } svg.graph.down { display: none; } }
.edge { fill: none; stroke: var(--quiet); stroke-width: 1.4; }
.tip { fill: var(--quiet); }
.stage { fill: var(--panel); stroke: var(--quiet); stroke-width: 1.4; }
.stage.good { stroke: var(--c0); } .stage.changed { stroke: var(--c1); stroke-dasharray: 5 3; }
.stage.absent { stroke-dasharray: 2 3; } .stage.bad { stroke: var(--c1); stroke-width: 3; }
svg text.stage-name { font-weight: 700; font-size: 13px; }
svg text.state.good { fill: var(--c0); } svg text.state.changed, svg text.state.bad { fill: var(--c1); }
svg text.state.absent { fill: var(--quiet); }
details { border: 1px solid var(--line); border-radius: 8px; background: var(--panel); margin: 8px 0;
  padding: 0 12px; }
details[open] { padding-bottom: 8px; }
summary { cursor: pointer; padding: 8px 0; }
.sample { display: grid; gap: 4px 22px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.sample > * { min-width: 0; }
dl { margin: 6px 0; } dt { color: var(--quiet); font-size: 0.83rem; margin-top: 6px; }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.same { color: var(--c2); font-size: 0.83rem; }
footer { margin-top: 40px; padding-bottom: 30px; }
"""
