"""The style of a report: light and dark, for wide and narrow screens, and for paper."""

STYLE = """
:root { --back: #fff; --card: #f6f8fa; --text: #1c2128; --muted: #57606a; --rule: #d5dbe1; --bar: #0f766e;
  --tail: #7fb3ae; --strong: #b45309; --good: #1a7f37; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --back: #11151a; --card: #1a2027; --text: #e3e8ee; --muted: #a0abb8;
  --rule: #38414c; --bar: #2fbfae; --tail: #1f766d; --strong: #f0a44b; --good: #56c271; --link: #79b8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 3rem; max-width: 74rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.3rem; margin: 2.25rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 0 0 .25rem; }
p { margin: 0 0 .75rem; }
a { color: var(--link); }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; }
header p, figure p, footer, dt, caption { color: var(--muted); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; margin: 0; padding: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 0 0 1rem; }
.tiles div { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .75rem 1rem;
  display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.tiles dd { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.25; }
.tiles dt { font-size: .9rem; }
.notes { list-style: none; margin: 0; padding: 0; }
.notes li { border-left: 4px solid var(--muted); padding: .1rem .75rem; margin: .35rem 0; }
.notes .warning { border-color: var(--strong); } .notes .warning strong { color: var(--strong); }
.notes .ok { border-color: var(--good); } .notes .ok strong { color: var(--good); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 32rem), 1fr)); gap: 0 2rem;
  margin: 0 0 1rem; }
.facts div { display: grid; grid-template-columns: 11rem 1fr; gap: .75rem; padding: .3rem 0;
  border-bottom: 1px solid var(--rule); }
.facts dd { margin: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem;
  align-items: start; margin: 0 0 1rem; }
figure { margin: 0; padding: 1rem; max-width: 40rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: .5rem; }
figure p { font-size: .9rem; margin: 0 0 .5rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--muted); font-variant-numeric: tabular-nums; }
svg .label, svg .axis { fill: var(--text); }
.bar { fill: var(--bar); } .tail { fill: var(--tail); }
.tick { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke: var(--bar); stroke-width: 2; }
.limit { stroke: var(--muted); stroke-width: 1.5; stroke-dasharray: 5 4; }
.chosen { fill: none; stroke: var(--strong); stroke-width: 2.5; }
summary { cursor: pointer; color: var(--link); font-size: .9rem; padding: .25rem 0; }
.scroll { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .25rem 0; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
.number { text-align: right; }
footer { margin-top: 2.5rem; font-size: .9rem; }
@media (max-width: 40rem) { body { padding: 1rem .9rem 2rem; } .facts div { grid-template-columns: 9.5rem 1fr; }
  svg text { font-size: 13.5px; }
  figure { padding: .75rem; } .tiles { grid-template-columns: 1fr 1fr; } .tiles dd { font-size: 1.2rem; } }
@media print { :root { --back: #fff; --card: #fff; --text: #000; --muted: #444; --rule: #bbb; --bar: #0f766e;
  --tail: #7fb3ae; --strong: #8a4b08; --good: #1a7f37; --link: #000; } body { max-width: none; font-size: 11pt; }
  nav, summary, details:not([open]) { display: none; } .grid { grid-template-columns: 1fr 1fr; }
  figure, .tiles div, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""
