"""The tools themselves: right answers, and an error in words for everything else."""

import datetime
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tml.serve.tools.calculator import calculate
from tml.serve.tools.canvas import MAX_SHAPES, Canvas, Shape
from tml.serve.tools.clock import time_in
from tml.serve.tools.search import Hit, TextIndex


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+1", "2"),
        ("2 * (3 + 4) ^ 2", "98"),
        ("-2 ** 2", "-4"),
        ("7 // 2 + 7 % 2", "4"),
        ("1 / 4", "0.25"),
        ("6 / 3", "2"),
        ("sqrt(16) + max(1, 2, 3)", "7"),
        ("2 ^ 100", str(2**100)),
        ("2 ^ -1", "0.5"),
        ("cos(pi)", "-1"),
        ("e", repr(math.e)),
        ("1e3", "1000"),
        ("round(2.567, 2)", "2.57"),
        ("round(1234, -2)", "1200"),
        ("1 ^ 5000 + (-1) ^ 5001", "0"),
    ],
)
def test_the_calculator_calculates(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("1 / 0", "has no value"),
        ("", "is not an expression"),
        ("2 +", "is not an expression"),
        ("9 ^ 9 ^ 9 ^ 9", "is larger than"),
        ("2 ^ 4000 * 2 ^ 4000", "larger than"),
        ("1e308 * 10", "infinite"),
        ("round(1, -999999999)", "at most 400, not -999999999"),
        ("2 ^ 2000 * 1.5", "has no value"),
        ("(-1) ^ 0.5", "is not a real number"),
        ("sqrt()", "has no value"),
        ("sqrt(-1)", "math domain error"),
        ("__import__('os')", "is not arithmetic"),
        ("().__class__", "is not arithmetic"),
        ("pi.real", "is not arithmetic"),
        ("[1][0]", "is not arithmetic"),
        ("'a' * 9", "is not arithmetic"),
        ("True + 1", "is not arithmetic"),
        ("(lambda: 1)()", "is not arithmetic"),
        ("1 if 1 else 2", "is not arithmetic"),
        ("sqrt(x=1)", "is not arithmetic"),
        ("open", "is not arithmetic"),
        ("1" * 501, "is longer than 500"),
        ("(" * 250 + ")" * 250, "is not an expression"),
    ],
)
def test_the_calculator_refuses_what_is_no_arithmetic_or_too_large(expression: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        calculate(expression)


def test_the_time_in_a_zone() -> None:
    now = datetime.datetime(2026, 11, 27, 13, 5, 9, tzinfo=datetime.UTC)
    assert time_in("UTC", now) == "Friday 2026-11-27 13:05:09 UTC+00:00"
    for zone in ("Nowhere/Land", "../etc/passwd", ""):
        with pytest.raises(ValueError, match="there is no time zone"):
            time_in(zone, now)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "bread.txt").write_text("Bread is baked every morning. The price of bread is five.")
    (tmp_path / "sub" / "coffee.md").write_text("The price\nof coffee is three.")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_search_finds_all_words_or_else_any(texts: Path) -> None:
    index = TextIndex(texts)
    assert index.search("price of coffee") == [Hit(title="sub/coffee", snippet="The price of coffee is three.")]
    assert [hit.title for hit in index.search("price")] == ["sub/coffee", "bread"]
    assert [hit.title for hit in index.search("baking tea")] == ["bread"]
    assert [hit.title for hit in index.search("price", limit=1)] == ["sub/coffee"]
    assert index.search("tea") == []


@pytest.mark.parametrize("query", ['"', "NEAR(", "price OR", "title:bread", "a AND NOT b", "price*", "'; DROP TABLE"])
def test_no_query_is_a_program(texts: Path, query: str) -> None:
    index = TextIndex(texts)
    if any(character.isalnum() for character in query):
        index.search(query)
    else:
        with pytest.raises(ValueError, match="has no word in it"):
            index.search(query)
    assert len(index.search("price")) == 2


def test_search_says_what_it_cannot_do(texts: Path) -> None:
    with pytest.raises(ValueError, match=r"limit = 0 is not in 1\.\.20"):
        TextIndex(texts).search("price", limit=0)
    with pytest.raises(ValueError, match="there is no such folder"):
        TextIndex(texts / "nowhere")
    (texts / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no text in it"):
        TextIndex(texts / "empty")
    (texts / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt: this is not UTF-8"):
        TextIndex(texts)


def shapes_in(path: Path) -> list[ElementTree.Element]:
    return list(ElementTree.parse(path).getroot())[1:]


def test_the_canvas_is_whole_after_every_shape(tmp_path: Path) -> None:
    path = tmp_path / "canvas.svg"
    canvas = Canvas(path)
    assert shapes_in(path) == []
    assert canvas.draw(Shape.CIRCLE, "red") == "drew a red circle at 320, 240"
    canvas.draw(Shape.SQUARE, "#00ff00", x=10.0, y=20.0, size=20.0)
    canvas.draw(Shape.TRIANGLE, x=100.0, y=100.0, size=50.5)
    circle, square, triangle = shapes_in(path)
    assert circle.attrib == {"cx": "320", "cy": "240", "r": "50", "fill": "red"}
    assert square.attrib == {"x": "0", "y": "10", "width": "20", "height": "20", "fill": "#00ff00"}
    assert triangle.attrib["points"] == "100,74.75 125.25,125.25 74.75,125.25"
    assert [file.name for file in tmp_path.iterdir()] == ["canvas.svg"]


def test_what_is_not_on_the_canvas_is_not_drawn(tmp_path: Path) -> None:
    canvas = Canvas(tmp_path / "canvas.svg")
    for arguments in (
        {"colour": 'red"/>'},
        {"x": -1.0},
        {"y": 481.0},
        {"size": 0.0},
        {"size": math.nan},
        {"x": math.inf},
    ):
        with pytest.raises(ValueError, match=r"colour|size"):
            canvas.draw(Shape.CIRCLE, **arguments)
    assert shapes_in(tmp_path / "canvas.svg") == []
    for _ in range(MAX_SHAPES):
        canvas.draw(Shape.CIRCLE)
    with pytest.raises(ValueError, match="is full"):
        canvas.draw(Shape.CIRCLE)
