"""A page of its own: one file, no network, no script, readable by day and night and on a phone."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from pipelines.errors import UserError
from trainer import chart
from trainer.run_folder import printable, write_atomic

_WIDEST = 1400  # pixels of a picture: a page is no wider

_STYLE = """
:root { --ink: #1b1b1b; --faint: #6b6b6b; --line: #e2e2e2; --page: #fff; --card: #f7f7f5; --bad: #b3400e;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #b58900; --c5: #6b6b6b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --faint: #a0a09c; --line: #3a3a38; --page: #191918;
  --card: #232322; --bad: #ff9a66; --c0: #56b4e9; --c1: #ff9a5c; --c2: #3fcfa4; --c3: #e6a3c8;
  --c4: #e0bd4a; --c5: #a0a09c; } img { filter: brightness(.92); } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 16px 64px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 40px 0 8px; }
p { margin: 8px 0; } .lead { font-size: 1.15rem; } .faint { color: var(--faint); } .bad { color: var(--bad); }
code, pre { font: .85rem/1.5 ui-monospace, monospace; background: var(--card); border-radius: 4px; padding: 1px 4px; }
pre { padding: 10px 12px; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere;
  min-width: 4.5rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
figure { margin: 0; } figcaption { font-size: .85rem; color: var(--faint); } img { max-width: 100%; height: auto;
  background: #fff; border-radius: 6px; } svg { width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--faint); } .grid { stroke: var(--line); }
@media (max-width: 520px) { svg text { font-size: 15px; } }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; } .dot { fill: var(--c); }
.key { margin-left: 10px; overflow-wrap: anywhere; } .key::before { content: ""; display: inline-block; width: 14px;
  height: 3px; margin-right: 5px; vertical-align: middle; background: var(--c); }
""" + "".join(f".c{i} {{ --c: var(--c{i}); }}\n" for i in range(chart.COLOURS))


def write(path: Path, title: str, parts: Iterable[str]) -> Path:
    """Write a page of these pieces of HTML.

    Raises:
        UserError: it cannot be written.
    """
    body = "\n".join(part for part in parts if part)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    try:
        write_atomic(path, page)
    except OSError as error:
        raise UserError(f"The report {path} cannot be written ({error.strerror}). Choose another place.") from None
    return path


def text(value: object) -> str:
    """For a page: names of classes and files are text, whatever is in them."""
    return html.escape(printable(str(value)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, escaped: bool = False, words: bool = False) -> str:
    """A table; its cells are text, or `escaped` already. With `words` they are sentences, and no numbers."""
    kind = ' class="text"' if words else ""
    top = "".join(f"<th{kind}>{text(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell if escaped else text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def picture(path: Path, caption: str) -> str:
    """A picture in the page itself, as wide as the page and no wider; nothing where there is none, or half of one."""
    try:
        with Image.open(path) as opened:
            shown = opened.convert("RGB")
    except OSError:  # of a worker that was killed while it drew
        return ""
    shown.thumbnail((_WIDEST, 4 * _WIDEST))
    stream = io.BytesIO()
    shown.save(stream, "WebP", quality=82, method=4)
    data = base64.b64encode(stream.getvalue()).decode()
    alt = html.escape(caption)
    size = f'width="{shown.width}" height="{shown.height}"'
    return f'<h2>{alt}</h2><img {size} alt="{alt}" src="data:image/webp;base64,{data}">'


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
