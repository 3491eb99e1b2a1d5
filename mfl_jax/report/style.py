"""The report's style sheet: a phone, a desktop, light, dark and paper. Colours are told apart with any colour vision
(after Okabe and Ito), and text of them has a contrast of 4.5 or more with the ground."""

CSS = """
:root { --ground:#fff; --ink:#1c1c1c; --soft:#595959; --rule:#d9d9d9; --wash:#f4f4f2; --link:#00558a;
 --c0:#0072b2; --c1:#b84a00; --c2:#007a5a; --c3:#a8437c; --c4:#7d6100; --c5:#4a4a4a; --c6:#6d3f9c; --c7:#0f7f93;
 --s0:#cfd9ea; --s1:#93b4d6; --s2:#558cbd; --s3:#23629a; --s4:#0b3866; color-scheme: light; }
@media screen and (prefers-color-scheme: dark) {
 :root { --ground:#16181a; --ink:#e8e8e6; --soft:#a9adb1; --rule:#3c4043; --wash:#202326; --link:#8ac6f2;
 --c0:#5eb3e8; --c1:#ff9550; --c2:#3ecf9f; --c3:#e79bc7; --c4:#e0bf3a; --c5:#c4c4c4; --c6:#c09ae8; --c7:#5fd0e0;
 --s0:#233a57; --s1:#2f5f8f; --s2:#4a8bc2; --s3:#85b9e0; --s4:#d8ebfa; color-scheme: dark; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.25rem 1rem 4rem; max-width: 68rem; background: var(--ground); color: var(--ink);
 font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
section { border-top: 1px solid var(--rule); margin-top: 2rem; padding-top: 1.1rem; }
p, ul.notes, ol { max-width: 44rem; margin: .5rem 0; overflow-wrap: anywhere; }
a { color: var(--link); }
.question { font-size: 1.05rem; color: var(--soft); margin: 0 0 .4rem; }
.answer { font-size: 1.2rem; line-height: 1.45; font-weight: 600; margin: 0 0 1rem; }
.soft, .made { color: var(--soft); } .made { font-size: .875rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .35rem 1rem; padding: 0; margin: 1rem 0 0; }
nav a { display: inline-block; padding: .2rem 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem 1rem; margin: 1rem 0; }
dt { font-size: .8125rem; color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem 2rem; }
.multiples { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr));
 gap: .75rem; align-items: end; }
figure { margin: .5rem 0 1rem; min-width: 0; break-inside: avoid; }
.plots figure { max-width: 34rem; } .multiples figure { margin: 0; }
figcaption { font-size: .875rem; color: var(--soft); max-width: 44rem; overflow-wrap: anywhere; }
figcaption.name { color: var(--ink); }
figure svg { display: block; width: 100%; height: auto; }
img { display: block; max-width: 100%; height: auto; background: #fff; }
.scroll { overflow-x: auto; margin: .75rem 0 1rem; }
.scroll:focus-visible, a:focus-visible, summary:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .875rem; padding-bottom: .3rem; }
caption span { display: block; position: sticky; left: 0;
 max-width: min(44rem, calc(100vw - 2rem)); }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 400; } thead th { color: var(--soft); font-size: .875rem; vertical-align: bottom; }
tbody th { min-width: 8rem; }
.number { text-align: right; white-space: nowrap; }
small { font-size: .87em; color: var(--soft); font-weight: 400; }
tr.strong th, tr.strong td { font-weight: 700; }
pre { background: var(--wash); padding: .75rem; overflow-x: auto; font-size: .8125rem; line-height: 1.45; }
pre, code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
details { margin: .5rem 0; } summary { cursor: pointer; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; font-size: .875rem; }
.legend svg { vertical-align: -.15em; margin-right: .35rem; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); } svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
svg .strong { font-weight: 700; } svg .named { fill: var(--c); }
.grid { stroke: var(--rule); stroke-width: .75; fill: none; }
.axis { stroke: var(--soft); stroke-width: 1; fill: none; }
.reference { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; fill: none; }
.frame { fill: none; stroke: var(--rule); }
.line, .bar, .open { fill: none; stroke: var(--c); stroke-width: 1.6; } .open { stroke-width: 1.4; }
.heavy { stroke-width: 3; } .fill { fill: var(--c); } .band { fill: var(--c); opacity: .14; }
.points .fill { opacity: .75; } .points .open { stroke-width: 1; }
.dots { fill: none; stroke: var(--c); stroke-width: 4; stroke-linecap: round; opacity: .45; }
"""

CSS += "".join(f".c{i} {{ --c: var(--c{i}); }}\n" for i in range(8))
CSS += "".join(f".s{i} {{ --c: var(--s{i}); }}\n" for i in range(5)) + ".s5 { --c: var(--soft); }\n"
CSS += """
@media (max-width: 30rem) {
 .answer { font-size: 1.1rem; } td.number small, th small { display: block; } th, td { padding-right: .7rem; }
 pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
 tbody th { max-width: 11rem; overflow-wrap: anywhere; }
}
@media print {
 @page { margin: 15mm; }
 html { font-size: 10pt; } body { max-width: none; padding: 0; } nav { display: none; }
 h2, h3, caption, .legend, section > p { break-after: avoid; } tr, figure, .short { break-inside: avoid; }
 details::details-content { content-visibility: visible; height: auto; }
 .scroll { overflow: visible; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
 table { font-size: .9rem; } td.number small { display: block; } .number { white-space: normal; }
 .plots { grid-template-columns: 1fr 1fr; } .multiples { grid-template-columns: repeat(5, 1fr); }
 img { max-height: 23cm; width: auto; }
}
"""
