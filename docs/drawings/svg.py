"""Boxes, arrows and text of the drawings in this folder, as SVG that is readable on light and on dark pages."""

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

LINE = 16  # pixels between two lines of text
CHARACTER = 0.55  # width of a character, in units of the font size; an estimate

SIZES = {"name": 14, "small": 12.5, "head": 17}
STYLE = """
  .back { fill: #ffffff } .box { fill: #eef3fb; stroke: #35587f } .good { fill: #e6f5e9; stroke: #2f7d46 }
  .warm { fill: #fdf1de; stroke: #a8701a } .bad { fill: #fdecea; stroke: #b3372b }
  .frame { fill: none; stroke: #8a8a8a; stroke-dasharray: 5 4 } .plain { fill: #f3f3f3; stroke: #8a8a8a }
  .edge { stroke: #4a4a4a; fill: none } .dashed { stroke-dasharray: 6 4 } .tip { fill: #4a4a4a }
  .name { fill: #111111; font-weight: bold; font-size: 14px } .small { fill: #333333; font-size: 12.5px }
  .head { fill: #111111; font-weight: bold; font-size: 17px }
  text { font-family: Helvetica, Arial, sans-serif; text-anchor: middle }
  .left { text-anchor: start } .end { text-anchor: end }
  rect, .edge { stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    .back { fill: #0d1117 } .box { fill: #16233a; stroke: #7ea6d9 } .good { fill: #12301c; stroke: #63bd7d }
    .warm { fill: #35270f; stroke: #e0ac5c } .bad { fill: #3a1714; stroke: #e5837a }
    .frame { stroke: #9a9a9a } .plain { fill: #22272e; stroke: #9a9a9a }
    .edge { stroke: #b5b5b5 } .tip { fill: #b5b5b5 }
    .name { fill: #f2f2f2 } .small { fill: #cfcfcf } .head { fill: #f2f2f2 }
  }
"""
TIP = (
    '<marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
    'orient="auto-start-reverse"><path class="tip" d="M0,0 L10,5 L0,10 z"/></marker>'
)


class Drawing:
    """Collects the parts of one drawing. Positions and sizes are pixels, from the upper left corner."""

    def __init__(self, title: str, *, width: int, height: int) -> None:
        self.title, self.width, self.height = title, width, height
        self.parts: list[str] = []

    def text(self, x: float, y: float, *lines: str, kind: str = "small") -> None:
        """Lines of text around the centre (x, y). kind: classes of STYLE; with `left` the lines start at x."""
        top = y - LINE * (len(lines) - 1) / 2 + 4.5
        for number, line in enumerate(lines):
            self.parts.append(f'<text class="{kind}" x="{x:g}" y="{top + LINE * number:g}">{escape(line)}</text>')

    def box(
        self, x: float, y: float, width: float, height: float, name: str = "", *lines: str, kind: str = "box"
    ) -> None:
        """A box with its upper left corner at (x, y): a bold name, and lines below it.

        Raises ValueError if the text does not fit, by an estimate of its width.
        """
        for line, style in ((name, "name"), *((line, "small") for line in lines)):
            if len(line) * SIZES[style] * CHARACTER > width:
                raise ValueError(f"{self.title}: {line!r} is wider than its box of {width} pixels")
        if ((name != "") + len(lines)) * LINE > height:
            raise ValueError(f"{self.title}: the lines of {name or lines[0]!r} are higher than {height} pixels")
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>')
        middle_x, middle_y = x + width / 2, y + height / 2
        if name:
            self.text(middle_x, middle_y - LINE * len(lines) / 2, name, kind="name")
        if lines:
            self.text(middle_x, middle_y + (LINE / 2 if name else 0), *lines)

    def frame(self, x: float, y: float, width: float, height: float, name: str) -> None:
        """A dashed frame with its name in the upper left corner."""
        self.parts.append(f'<rect class="frame" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="9"/>')
        self.text(x + 12, y + 16, name, kind="name left")

    def arrow(self, *points: tuple[float, float], both: bool = False, tip: bool = True, dashed: bool = False) -> None:
        """A line through the points, with a tip at the last one. both: a tip at the first one too."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        tips = (' marker-start="url(#tip)"' if both else "") + (' marker-end="url(#tip)"' if tip or both else "")
        self.parts.append(f'<polyline class="edge{" dashed" if dashed else ""}" points="{path}"{tips}/>')

    def svg(self) -> str:
        """The complete drawing."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" aria-label="{escape(self.title)}">'
        )
        back = f'<rect class="back" width="{self.width}" height="{self.height}"/>'
        parts: Sequence[str] = (head, f"<style>{STYLE}</style>", f"<defs>{TIP}</defs>", back, *self.parts, "</svg>")
        return "\n".join(parts) + "\n"

    def write(self, script: str) -> None:
        """Writes the drawing beside the script that made it, under the same name."""
        Path(script).with_suffix(".svg").write_text(self.svg(), encoding="utf-8")
