"""Pages of HTML that need nothing beside them: style, pictures and curves are in the one file, and nothing is fetched.

They follow the reader's choice of light or dark, and fit a phone. Every text goes through `escaped`: rows may hold anything.
Headings, paragraphs and the names of a table's rows are told as commands tell things, in Chinese to those who ask for it:
`worded`. What users name, and what rows and cells hold, is shown as it is.
"""

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from model.chinese import in_ui_language, speaks_chinese
from model.errors import InputError
from model.inference.scores import Result

THUMBNAIL = 240  # pixels of the longer edge
COLOURS = 6  # of curves, in STYLE; then they begin anew

STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f6f7f9;--text:#1b1f24;--faint:#5d6670;--line:#d9dee4;--good:#1a7f37;
--bad:#b3261e;--c0:#1f5fa8;--c1:#d9680f;--c2:#1a7f37;--c3:#8250df;--c4:#b3261e;--c5:#0e7c86}
@media(prefers-color-scheme:dark){:root{--page:#14171b;--card:#1e2329;--text:#e4e8ec;--faint:#98a2ad;--line:#39414a;
--good:#57ab5a;--bad:#f47067;--c0:#6cb0f5;--c1:#f0964a;--c2:#57ab5a;--c3:#b392f0;--c4:#f47067;--c5:#39c5cf}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1000px;padding:1rem;background:var(--page);color:var(--text);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.4rem 0;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.faint,figcaption,th{color:var(--faint)}p{margin:.4rem 0}
.wide{overflow-x:auto}table{border-collapse:collapse}td,th{padding:.25rem .9rem .25rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line);font-weight:normal;overflow-wrap:anywhere}thead th{font-weight:600;color:var(--text)}
.differs td{font-weight:600}.flag th{white-space:nowrap}
.row{display:grid;grid-template-columns:200px 1fr;gap:1rem;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:.8rem;margin:.7rem 0}.row.text{grid-template-columns:1fr}
.row img{width:100%;border-radius:4px;display:block}
dl{margin:0;display:grid;grid-template-columns:max-content 1fr;gap:.15rem .8rem;align-content:start}
dt{color:var(--faint)}dd{margin:0;overflow-wrap:anywhere;white-space:pre-wrap}
.good{color:var(--good)}.bad{color:var(--bad)}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.6rem;overflow-x:auto;font-size:.85rem}
figure{margin:.5rem 0}svg{width:100%;height:auto;display:block}svg text{fill:var(--faint);font:11px system-ui,sans-serif}
svg .grid{stroke:var(--line);stroke-width:1}svg path{fill:none;stroke-width:1.6}svg path.pale{stroke-width:1;opacity:.35}
.key{display:inline-block;margin-right:1rem;overflow-wrap:anywhere}
.key i{display:inline-block;width:1.2em;height:.25em;margin-right:.35em;vertical-align:middle}
@media(max-width:600px){body{padding:.7rem}.row{grid-template-columns:1fr}.row img{max-width:240px}
svg text{font-size:17px}dl{grid-template-columns:1fr}dd{margin-bottom:.35rem}}
"""


OWN_PAGE = re.compile(
    rb"<!doctype html>\n<html[^>]*><head>.*<style>\n:root[{]color-scheme:light dark;--page:", re.DOTALL
)


def escaped(text: object) -> str:
    """A text as HTML shows it; half a character, which no file takes, is shown as a question mark."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"))


def worded(text: str) -> str:
    """A text of ours as HTML shows it, in the language that the user is spoken to."""
    return escaped(in_ui_language(text))


def page(title: str, *parts: str) -> str:
    """A whole page."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    html_tag = f'<html lang="{"zh" if speaks_chinese() else "en"}">'
    return (
        f"<!doctype html>\n{html_tag}<head>{head}<title>{escaped(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A heading and what stands below it; nothing if that is nothing."""
    body = "\n".join(part for part in parts if part)
    return f"<h2>{worded(heading)}</h2>\n{body}" if body else ""


def paragraphs(lines: Iterable[str]) -> str:
    """A paragraph for each line."""
    return "\n".join(f"<p>{worded(line)}</p>" for line in lines)


def table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table: the name of each row, and its cells. A row whose cells are not all the same is bold."""
    head = "".join(f"<th>{escaped(one)}</th>" for one in heads)
    lines = [f"<thead><tr><th></th>{head}</tr></thead>"] if any(heads) else []
    for name, cells in rows:
        kinds = ["differs"] * (len(set(cells)) > 1) + ["flag"] * name.startswith("--")
        mark = f' class="{" ".join(kinds)}"' if kinds else ""
        lines.append(f"<tr{mark}><th>{worded(name)}</th>{''.join(f'<td>{escaped(cell)}</td>' for cell in cells)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


# --- rows and their answers -------------------------------------------------------------------------------------------


def row_card(row: Result, answers: Sequence[tuple[str, Result]]) -> str:
    """A row with its picture, shrunk, and what was answered, each with the name of who or when."""
    source = thumbnail(row.img)
    shown = [(worded("question"), escaped(row.prompt)), (worded("label"), escaped(row.label))]
    for name, result in answers:
        mark = "good" if result.right else "bad"
        cut = " …" if result.cut else ""
        shown.append(
            (escaped(name), f'<span class="{mark}">{escaped(result.answer) or worded("(nothing)")}{cut}</span>')
        )
    entries = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in shown)
    if row.img and source is None:
        gone = in_ui_language(", which can't be opened now")
        entries += f'<dt>{worded("picture")}</dt><dd class="faint">{escaped(row.img)}{gone}</dd>'
    if source is None:
        return f'<div class="row text"><dl>{entries}</dl></div>'
    image = f'<img src="{source}" alt="{escaped(Path(row.img).name)}">'
    return f'<div class="row"><div>{image}</div><dl>{entries}</dl></div>'


def thumbnail(path: str) -> str | None:
    """An image, shrunk, as a data: URI; None if it can't be opened, or there is none."""
    from model.data.images import open_image

    if not path:
        return None
    try:
        image = open_image(path, THUMBNAIL).copy()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
    except (InputError, OSError, ValueError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


# --- curves -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Points (x, y) with a name. Pale ones stand behind the others and have no key; dots mark each point."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    pale: bool = False
    dots: bool = False


WIDTH, LEFT, RIGHT, TOP, BOTTOM = 640, 60, 12, 10, 26  # pixels of a drawing, and its margins
MOST_POINTS = 800  # of a curve: more than there are pixels


def chart(curves: Sequence[Curve], height: int, what: str, most: float | None = None) -> str:
    """Curves over steps, with their keys. What is above most is cut off; points that aren't finite are left out."""
    drawn = [_finite(curve) for curve in curves]
    xs, ys = ([point[axis] for curve in drawn for point in curve.points] for axis in (0, 1))
    if not xs:
        return ""
    end = max(xs)
    high = min(max(ys), most) if most else max(ys)
    step = _tick(high, max(2, height // 40))
    top = step * max(1, math.ceil(high / step - 1e-9))

    def at(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (x / end if end else 0)
        return f"{across:.1f} {TOP + (height - TOP - BOTTOM) * (1 - y / top):.1f}"

    parts = []
    for number in range(round(top / step) + 1):
        x, y = at(0, number * step).split()
        parts.append(f'<line class="grid" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4}" text-anchor="end">{number * step:.4g}</text>')
    for tick in range(5):
        label, x = round(end * tick / 4), at(end * tick / 4, 0).split()[0]
        anchor = "end" if tick == 4 else "start" if tick == 0 else "middle"
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="{anchor}">{label}</text>')
    for curve in sorted(drawn, key=lambda curve: not curve.pale):
        colour = f"var(--c{curve.colour % COLOURS})"
        kind = "pale" if curve.pale else "plain"
        for run in _below(curve.points, top):
            path = "M" + " L".join(at(*point) for point in run)
            parts.append(f'<path class="{kind}" d="{path}" style="stroke:{colour}"/>')
        for point in (one for one in curve.points if curve.dots and one[1] <= top):
            x, y = at(*point).split()
            parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" style="fill:{colour}"/>')
    keys = "".join(
        f'<span class="key"><i style="background:var(--c{curve.colour % COLOURS})"></i>{escaped(curve.name)}</span>'
        for curve in curves
        if curve.name and not curve.pale
    )
    drawing = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{worded(what)}">{"".join(parts)}</svg>'
    return f"<figure>{drawing}<figcaption>{keys}</figcaption></figure>"


def _below(points: Sequence[tuple[float, float]], top: float) -> list[list[tuple[float, float]]]:
    """The runs of points up to top, each with where the curve crosses that."""
    runs: list[list[tuple[float, float]]] = [[]]
    for before, point in zip([None, *points], points, strict=False):
        if before is not None and (before[1] > top) != (point[1] > top):
            share = (top - before[1]) / (point[1] - before[1])
            runs[-1].append((before[0] + share * (point[0] - before[0]), top))
        if point[1] <= top:
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _finite(curve: Curve) -> Curve:
    """A curve of its finite points; of very many the lowest and the highest of each stretch, so that no spike is lost."""
    points = [point for point in curve.points if all(map(math.isfinite, point))]
    if len(points) > MOST_POINTS:
        each = math.ceil(2 * len(points) / MOST_POINTS)
        stretches = [points[start : start + each] for start in range(0, len(points), each)]
        ends = [
            (min(some, key=itemgetter(1)), max(some, key=itemgetter(1)), points[0], points[-1]) for some in stretches
        ]
        points = sorted({point for some in ends for point in some})
    return Curve(curve.name, points, curve.colour, curve.pale, curve.dots)


def _tick(high: float, lines: int) -> float:
    """A round distance between so many lines, at most, from 0 to high."""
    if high <= 0:
        return 1.0
    size = 10.0 ** math.floor(math.log10(high / lines))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor * lines >= high)
