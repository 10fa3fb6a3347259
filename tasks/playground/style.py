"""The style sheet of the page, on top of Gradio's own. Colours are those of the report."""

STYLE = """
.gradio-container {
  --ink: #1b1f24; --quiet: #57606a; --line: #d5d9de; --panel: #ffffff; --shade: #f0f2f4;
  --c0: #0072b2; --c1: #b85000; --c2: #007a5a;
  --block-info-text-color: var(--quiet); --block-label-text-color: var(--ink);
  --block-title-text-color: var(--ink);
  --color-accent: var(--c0); --slider-color: var(--c0); --button-primary-background-fill: var(--c0);
  --button-primary-background-fill-hover: color-mix(in srgb, var(--c0) 85%, var(--ink));
  --checkbox-background-color-selected: var(--c0); --checkbox-border-color-selected: var(--c0);
  --button-primary-text-color: #ffffff;
  max-width: 1500px !important; margin: 0 auto !important; color: var(--ink);
}
.dark .gradio-container, .gradio-container.dark {
  --ink: #e6e8ea; --quiet: #a3abb5; --line: #3a414a; --panel: #1c2026; --shade: #242a31;
  --c0: #62b6f0; --c1: #f0a030; --c2: #35c49a; --button-primary-text-color: #10151a;
}
.gradio-container h1 { font-size: 1.6rem; margin: 6px 0 2px; }
.gradio-container h2 { font-size: 1.15rem; margin: 18px 0 4px; }
.page h3 { font-size: 1rem; margin: 0 0 6px; }
.page { color: var(--ink); font-size: 15px; line-height: 1.5; overflow-wrap: anywhere; }
.page .quiet { color: var(--quiet); font-size: 0.88rem; margin: 6px 0; }
.page .trouble { color: var(--ink); border: 1px solid var(--c1); border-left-width: 5px; border-radius: 6px;
  padding: 8px 12px; margin: 0; background: var(--panel); }
.page .good { color: var(--c2); } .page .bad { color: var(--c1); font-weight: 700; }
.page code, .page pre { font: 0.86rem/1.45 ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace;
  background: none; }
.page pre { white-space: pre-wrap; margin: 6px 0 0; padding: 8px 10px; background: var(--shade);
  border-radius: 6px; color: var(--ink); }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr)); }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  min-width: 0; display: flex; flex-direction: column; }
.card .answer { white-space: pre-wrap; margin: 0 0 10px; flex: 1; }
.card dl { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0; }
.card dt { color: var(--quiet); font-size: 0.78rem; }
.card dd { margin: 0; font-variant-numeric: tabular-nums; }
.card details { margin-top: 8px; border-top: 1px solid var(--line); padding-top: 6px; }
.card summary { cursor: pointer; color: var(--quiet); font-size: 0.85rem; }
.strip { display: flex; flex-wrap: wrap; gap: 3px; }
.strip button { font: 0.86rem/1.6 ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; padding: 1px 6px;
  color: var(--ink); border: 1px solid var(--line); border-radius: 4px; cursor: pointer;
  background: color-mix(in srgb, var(--c0) calc(var(--sure) * 32%), var(--panel)); }
.strip button:hover { border-color: var(--c0); }
.strip button[aria-current] { outline: 2px solid var(--c1); outline-offset: 1px; }
.scroll { overflow-x: auto; width: 0; min-width: 100%; }  /* asks for no width of its own */
.page table.chart { border-collapse: collapse; border: 0; width: 100%; table-layout: fixed; min-width: 340px;
  margin: 4px 0; }
.page .chart th, .page .chart td { text-align: left; vertical-align: middle; padding: 3px 10px 3px 0; border: 0;
  color: var(--ink); background: none; font-weight: 400; }
.page .chart tr { border: 0; background: none; }
.page .chart thead th { vertical-align: bottom; font-weight: 600; font-size: 0.88rem; line-height: 1.25;
  padding-bottom: 6px; }
.page .chart thead th:first-child { width: 8.5em; }
.page .chart small { display: block; color: var(--quiet); font-weight: 400; font-size: 0.76rem; }
.page .chart tbody th { border-right: 1px solid var(--line); }
.page .chart td { padding-left: 8px; }
.page .chart .chosen th { font-weight: 700; color: var(--c1); }
.page .chart .bar { display: inline-block; vertical-align: middle; height: 13px; border-radius: 2px;
  width: calc(var(--w) * (100% - 4.6em)); min-width: 1px; background: var(--c0); transition: width 0.15s; }
.page .chart .chosen .bar { background: var(--c1); }
.page .chart .rest { background: var(--quiet); opacity: 0.5; }
.page .chart .bar.cut { background: none; border: 1px dashed var(--quiet); }
.page .chart .share { font-size: 0.8rem; color: var(--quiet); margin-left: 6px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
@media (max-width: 640px) {
  .page .chart thead th:first-child { width: 6.5em; }
  .page .chart .bar { display: block; width: calc(var(--w) * 100%); height: 9px; }
  .page .chart .share { margin-left: 0; }
  .page .chart { font-size: 0.85rem; }
}
@media (prefers-reduced-motion: reduce) { .page .chart .bar { transition: none; } }
"""
