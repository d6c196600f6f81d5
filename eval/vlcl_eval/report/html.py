"""report.md as a page for a browser, self-contained, in the look of a run's report.html."""

from __future__ import annotations

import base64
from html import escape

from vlcl.report.template import CSS, PAGE

OWN_CSS = """
main { max-width:1180px; } ul { padding-left:20px; } main > p { margin:10px 0; } h3 { margin:22px 0 8px; }
.scroll img { display:block; min-width:760px; width:100%; height:auto; background:#fff; border-radius:12px; }
td, th { padding:6px 12px; font-size:14.5px; } td { white-space:nowrap; } th { min-width:76px; }
td:first-child { white-space:normal; min-width:150px; }
"""


def as_html(text: str, figure: bytes) -> str:
    """The page. text: Markdown, whose first line is the title, without HTML; figure: the PNG that it shows."""
    from markdown_it import MarkdownIt  # comes with rich

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    picture = base64.b64encode(figure).decode("ascii")
    body = body.replace('<p><img src="report.png"', f'<p class="scroll"><img src="data:image/png;base64,{picture}"')
    title = text.splitlines()[0].lstrip("# ")
    return PAGE.format(title=escape(title), css=CSS + OWN_CSS, body=body)
