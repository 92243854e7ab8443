"""A canvas that shapes are drawn on, kept as an SVG file that is whole at any time."""

import enum
import re
import threading
from pathlib import Path
from xml.etree import ElementTree

from tml.whole_folder import write_whole

WIDTH_PX, HEIGHT_PX = 640, 480
MAX_SHAPES = 1_000
COLOUR = r"[a-z]{3,20}|#[0-9a-f]{6}"
"""A colour's name in CSS, or #rrggbb."""


class Shape(enum.StrEnum):
    """What can be drawn."""

    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"


class Canvas:
    """Shapes on white, in the order in which they were drawn. What is in the file already is drawn over."""

    def __init__(self, path: Path) -> None:
        """Starts an empty canvas and writes it.

        Raises:
            OSError: the file cannot be written.
        """
        self._path, self._lock = path, threading.Lock()
        self._shapes: list[ElementTree.Element] = []
        self._write()

    def draw(
        self,
        shape: Shape,
        colour: str = "black",
        x: int | float = WIDTH_PX / 2,
        y: int | float = HEIGHT_PX / 2,
        size: int | float = 100.0,
    ) -> str:
        """Draws a shape and says what was drawn.

        Args:
            shape: what.
            colour: a colour's name in CSS, or #rrggbb.
            x: of its centre, in pixels from the left.
            y: of its centre, in pixels from the top.
            size: its width, in pixels.

        Raises:
            ValueError: no such colour, a size or place that is not on the canvas, or too many shapes.
        """
        if not re.fullmatch(COLOUR, colour):
            raise ValueError(f"colour {colour!r} is neither a name nor #rrggbb")
        if not 0 < size <= WIDTH_PX or not 0 <= x <= WIDTH_PX or not 0 <= y <= HEIGHT_PX:
            raise ValueError(
                f"size {size:g} at {x:g}, {y:g} does not lie on the canvas of {WIDTH_PX} x {HEIGHT_PX} pixels"
            )
        with self._lock:
            if len(self._shapes) >= MAX_SHAPES:
                raise ValueError(f"the canvas holds {MAX_SHAPES} shapes and is full")
            self._shapes.append(_element(shape, colour, x, y, size))
            self._write()
        return f"drew a {colour} {shape.value} at {x:g}, {y:g}"

    def _write(self) -> None:
        picture = ElementTree.Element(
            "svg", xmlns="http://www.w3.org/2000/svg", width=str(WIDTH_PX), height=str(HEIGHT_PX)
        )
        ElementTree.SubElement(picture, "rect", width="100%", height="100%", fill="white")
        picture.extend(self._shapes)
        write_whole(self._path, ElementTree.tostring(picture, encoding="unicode") + "\n")


def _element(shape: Shape, colour: str, x: int | float, y: int | float, size: int | float) -> ElementTree.Element:
    half = size / 2
    if shape is Shape.CIRCLE:
        return ElementTree.Element("circle", cx=f"{x:g}", cy=f"{y:g}", r=f"{half:g}", fill=colour)
    if shape is Shape.SQUARE:
        place = {"x": f"{x - half:g}", "y": f"{y - half:g}", "width": f"{size:g}", "height": f"{size:g}"}
        return ElementTree.Element("rect", place, fill=colour)
    corners = ((x, y - half), (x + half, y + half), (x - half, y + half))
    points = " ".join(f"{corner_x:g},{corner_y:g}" for corner_x, corner_y in corners)
    return ElementTree.Element("polygon", points=points, fill=colour)
