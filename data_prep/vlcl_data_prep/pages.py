"""Parts of the pages of `vlcl data show` and `vlcl data stats`, in the look of report.html."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from vlcl.report.template import CSS, PAGE

OWN_CSS = """
.samples { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,212px),1fr)); gap:14px; }
.sample { background:var(--card); border:1px solid var(--rule); border-radius:12px; padding:12px; min-width:0; }
.sample .shown { display:flex; align-items:center; justify-content:center; aspect-ratio:1; border-radius:8px;
  background:var(--page); margin-bottom:9px; overflow:hidden; }
.sample img { display:block; width:100%; height:100%; object-fit:contain; }
h1 { font-size:26px; }
.sample h3 { font-size:14px; } .sample h3 span, .small { color:var(--muted); font-weight:400; font-size:13px; }
.small { overflow-wrap:anywhere; line-height:1.4; }
.sample ul { margin:7px 0 0; padding:0; list-style:none; max-height:190px; overflow-y:auto; }
.sample li { font-size:14.5px; line-height:1.4; padding:4px 0; border-top:1px solid var(--rule); }
.bad { color:var(--bad); } .sample .shown.bad { padding:10px; text-align:center; font-size:14px; font-weight:600;
  overflow-wrap:anywhere; }
:root { --bad:#b42330; }
@media (prefers-color-scheme: dark) { :root { --bad:#ff8f8f; } }
.panels { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr)); gap:16px; }
.panel { background:var(--card); border:1px solid var(--rule); border-radius:12px; padding:14px 16px; min-width:0; }
.panel h3 { margin-bottom:2px; } .panel p { color:var(--muted); font-size:13.5px; margin-bottom:9px; }
.bars { display:grid; grid-template-columns:auto minmax(40px,1fr) auto; gap:5px 12px; align-items:center;
  font-size:14px; font-variant-numeric:tabular-nums; }
.bars span { overflow-wrap:anywhere; max-width:210px; } .bars b { font-weight:500; text-align:right; }
.bars b small { color:var(--muted); font-weight:400; font-size:12.5px; margin-left:6px; }
.bars i { display:block; height:14px; min-width:1px; border-radius:3px; background:var(--s1); }
@media (max-width:560px) { .samples { grid-template-columns:1fr 1fr; gap:10px; } .sample { padding:9px; }
  .bars span { max-width:130px; } }
"""

_EMPTY = ";min-width:0"
THUMBNAIL = 224  # px, longer side


def page(title: str, body: Sequence[str]) -> str:
    """A whole page; every text in `body` is escaped already."""
    return PAGE.format(title=escape(title), css=CSS + OWN_CSS, body="\n".join(body))


def header(kicker: str, title: str, facts: Mapping[str, str]) -> str:
    rows = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items() if value)
    return f'<header><p class="kicker">{kicker}</p><h1>{escape(title)}</h1><dl class="facts">{rows}</dl></header>'


def thumbnail(image: Image.Image, alt: str) -> str:
    """An RGB picture as an <img>, scaled down to THUMBNAIL; small ones stay as they are. As PNG, or as JPEG where that
    is smaller."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    found = {}
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        small.save(buffer, kind, **settings)
        found[kind] = buffer.getvalue()
    kind = min(found, key=lambda kind: len(found[kind]))
    data = base64.b64encode(found[kind]).decode("ascii")
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(alt)}">'


def bars(title: str, explanation: str, counts: Mapping[str, int], total: int) -> str:
    """A panel with a bar for each count; shares are of `total`. "" where there is nothing to count."""
    if not any(counts.values()):
        return ""
    most = max(counts.values())
    rows = "".join(
        f'<span>{escape(label)}</span><i style="width:{100 * count / most:.1f}%{_EMPTY * (not count)}"></i>'
        f"<b>{share(count, total)}<small>{count:,}</small></b>"
        for label, count in counts.items()
    )
    return f'<div class="panel"><h3>{title}</h3><p>{explanation}</p><div class="bars">{rows}</div></div>'


def share(count: int, total: int) -> str:
    """In percent, so that neither some reads as none nor most as all."""
    percent = f"{100 * count / total:.1f}%" if total else "0%"
    if percent == "0.0%" or not count:
        return "<0.1%" if count else "0%"
    if percent == "100.0%":
        return ">99.9%" if count < total else "100%"
    return percent


def in_bytes(size: int) -> str:
    return (
        f"{size:,} bytes" if size < 10_000 else f"{size / 1024:,.0f} KiB" if size < 10 << 20 else f"{size >> 20:,} MiB"
    )
