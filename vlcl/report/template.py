"""What is around the content of report.html: its HTML (`PAGE`, a template of title, css and body) and its CSS.

The CSS has a light and a dark palette; the figures are drawn in its variables.
"""

from __future__ import annotations

from vlcl.report.style import COLOURS, GOOD, INK, MUTED, RULE

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title} · vlcl report</title>
<style>{css}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

CSS = (
    f"""
:root {{ --page:#f4f5f7; --card:#fff; --ink:{INK}; --muted:{MUTED}; --rule:{RULE}; --good:{GOOD}; --goodsoft:#e3f4ea;
  --s1:{COLOURS[0]}; --s2:{COLOURS[1]}; --r1:#17479e; --r5:#4a82de; --r10:#94b6ee; }}
"""
    """\
@media (prefers-color-scheme: dark) { :root { --page:#131619; --card:#1c2024; --ink:#e7eaed; --muted:#9aa5b0;
  --rule:#333a41; --good:#3fbf75; --goodsoft:#173626; --s1:#6ea4ff; --s2:#ff9a52; --r1:#b3d0ff; --r5:#6099ee;
  --r10:#4a73b5; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--page); color:var(--ink); line-height:1.5; font-size:16px;
  font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:980px; margin:0 auto; padding:32px 20px 64px; }
h1 { font-size:34px; line-height:1.15; margin:0 0 10px; overflow-wrap:anywhere; }
h2 { font-size:21px; margin:44px 0 12px; } h3 { font-size:16px; margin:0; overflow-wrap:anywhere; } p { margin:0; }
.kicker { color:var(--muted); font-size:14px; } .note { color:var(--muted); font-size:14px; margin:0 0 12px; }
.status { display:inline-block; padding:3px 12px; border-radius:99px; font-size:14px; font-weight:600;
  background:var(--rule); } .status.done { background:var(--goodsoft); color:var(--good); }
.facts { display:grid; grid-template-columns:repeat(auto-fill,minmax(210px,1fr)); gap:12px 24px; margin:20px 0 26px; }
.facts .wide { grid-column:1/-1; } .settings { display:grid; gap:1px 24px;
  grid-template-columns:repeat(auto-fill,minmax(210px,1fr)); font-size:14.5px; color:var(--muted); }
.settings b { color:var(--ink); font-weight:500; }
dt { color:var(--muted); font-size:13px; } dd { margin:0; overflow-wrap:anywhere; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:14px; margin-bottom:10px; }
.tile, figure, .card, pre, details, table { background:var(--card); border:1px solid var(--rule); border-radius:12px; }
.tile { padding:14px 16px; } .tile h3 { font-size:14px; font-weight:500; color:var(--muted); }
.value { font-size:38px; font-weight:650; line-height:1.25; letter-spacing:-.02em; white-space:nowrap; }
.quality .value { color:var(--s1); } .value small { font-size:55%; font-weight:500; margin-left:2px; }
.below { font-size:13px; color:var(--muted); } .below span { display:inline-block; margin-right:10px; }
.figures { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr)); gap:16px; }
figure { margin:0; padding:16px 14px 8px; display:flex; flex-direction:column; justify-content:space-between; }
figcaption p { color:var(--muted); font-size:13.5px; margin:2px 0 8px; }
figcaption { padding:0 4px; } svg { display:block; width:100%; height:auto; } svg * { stroke-linejoin:round; }
table { border-collapse:separate; border-spacing:0; overflow:hidden; min-width:300px;
  font-variant-numeric:tabular-nums; }
.scroll { overflow-x:auto; }
td, th { padding:7px 16px; text-align:left; border-bottom:1px solid var(--rule); font-size:15px; }
td + td, th + th { text-align:right; } tfoot td { border:0; font-weight:600; }
th { color:var(--muted); font-weight:500; }
.card { padding:14px 16px; margin-bottom:14px; } .figures .card { margin:0; }
.rank { font-size:13px; font-weight:600; white-space:nowrap; padding:1px 10px; border-radius:99px; margin-left:6px;
  color:var(--muted); background:var(--page); } .rank.good { color:var(--good); background:var(--goodsoft); }
.hits { display:grid; grid-template-columns:repeat(6,minmax(0,128px)); gap:12px; margin-top:12px; }
.hit { text-align:center; font-size:13px; color:var(--muted); font-variant-numeric:tabular-nums; }
.hit img { display:block; width:100%; aspect-ratio:1; object-fit:contain; background:#fff; border-radius:8px;
  border:1px solid var(--rule); padding:4px; margin-bottom:3px; }
.hit.good { color:var(--good); font-weight:650; } .hit.good img { border-color:transparent;
  outline:3px solid var(--good); }
.hit.apart { grid-column:6; } .hit.apart img { outline-style:dashed; }
.query { display:grid; grid-template-columns:104px minmax(0,1fr); gap:16px; align-items:start; }
ol { margin:0; padding-left:22px; font-size:14.5px; } li::marker { color:var(--muted); }
li { overflow-wrap:anywhere; } li b { color:var(--muted); font-weight:400; font-size:13px; margin-left:8px; }
li.good, li.good b { color:var(--good); font-weight:650; } .query .note { margin:6px 0 0; }
pre { margin:4px 0 14px; padding:12px 14px; overflow-x:auto; font-size:13.5px; line-height:1.5;
  font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; }
details { padding:12px 16px; margin-top:14px; } summary { cursor:pointer; font-weight:600; }
details pre { border:0; padding:8px 0 0; margin:0; }
@media (max-width:560px) { main { padding:20px 12px 40px; } h1 { font-size:27px; } .value { font-size:30px; }
  .tiles, .facts, .settings { grid-template-columns:1fr 1fr; } .hits { grid-template-columns:repeat(3,minmax(0,1fr)); }
  .hit.apart { grid-column:auto; } .query { grid-template-columns:80px minmax(0,1fr); } }
"""
)
