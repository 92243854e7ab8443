"""The plan of the house, read from the source: floors, circles, sizes, names, unread config fields, apps with help."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = ("tml", "data_pipelines", "experiments", "launch")

FLOORS = {
    0: ("config", "dims", "microturn", "session", "calls", "foreign_files", "whole_folder"),
    1: ("mesh", "params", "batch", "flops", "metrics", "xla_flags"),
    2: ("ops", "codec", "timeline"),
    3: ("model",),
    4: ("objective", "optim"),
    5: ("train_step", "stream"),
    6: ("checkpoint", "checkpoint_pieces", "checksums"),
    7: ("train", "evaluate", "duplex"),
    8: ("export", "plan"),
    9: ("serve",),
}
"""A room of `tml` imports rooms on lower floors, or on its own floor as long as there is no circle."""

FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
HIGHEST_FLOOR_OF_PIPELINES = 2
FORBIDDEN_NAMES = ("util", "utils", "common", "misc", "helper", "helpers", "lib")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 100


def source_files(*tops: str) -> list[Path]:
    return sorted(path for top in tops for path in (ROOT / top).rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in source_files(*TOP_LEVEL)}


def imports_of(path: Path) -> set[str]:
    """Every module of ours or of others that a file imports, at the top, inside functions and for type checks."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name of the module"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
    return found


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "tml" and len(parts) > 1 else None


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module in MODULES} - {None}
    assert rooms <= FLOOR_OF.keys(), f"put {sorted(rooms - FLOOR_OF.keys())} on a floor"


def test_rooms_import_downwards_only():
    broken = []
    for module, path in MODULES.items():
        room = room_of(module)
        for name in imports_of(path):
            other = room_of(name)
            if room and other and FLOOR_OF[other] > FLOOR_OF[room]:
                broken.append(f"{module} (floor {FLOOR_OF[room]}) imports {name} (floor {FLOOR_OF[other]})")
    assert not broken, "\n".join(broken)


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, or nothing."""
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            circle = visit(other, [*way, node])
            if circle:
                return circle
        done.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := visit(node, []))), [])


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_circles_between_rooms_or_modules():
    modules = {module: imports_of(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    # A package may gather what its own modules define, and they are initialised through it.
    modules = {
        module: {other for other in others if not module.startswith(other + ".")} for module, others in modules.items()
    }
    assert not circle_in(modules)
    rooms: dict[str, set[str]] = {}
    for module, others in modules.items():
        room = room_of(module)
        if room:
            rooms.setdefault(room, set()).update({room_of(other) for other in others} - {room, None})
    assert not circle_in(rooms)


def test_top_level_folders_import_what_they_may():
    broken = []
    for module, path in MODULES.items():
        top = module.split(".")[0]
        for name in imports_of(path):
            other, room = name.split(".")[0], room_of(name)
            if other not in TOP_LEVEL or other == top:
                continue
            allowed = {
                "tml": False,
                "data_pipelines": room is not None and FLOOR_OF[room] <= HIGHEST_FLOOR_OF_PIPELINES,
                "experiments": room == "config",
                "launch": True,
            }[top]
            if not allowed:
                broken.append(f"{module} imports {name}")
    assert not broken, "\n".join(broken)


def test_configuration_words_and_layout_do_without_jax():
    for module, path in MODULES.items():
        if room_of(module) in FLOORS[0] or module.startswith("experiments"):
            heavy = {name for name in imports_of(path) if name.split(".")[0] in ("jax", "flax", "optax", "orbax")}
            assert not heavy, f"{module} imports {heavy}"


def test_nobody_uses_the_insides_of_jax():
    for module, path in MODULES.items():
        inside = {name for name in imports_of(path) if name.startswith("jax._src")}
        assert not inside, f"{module} imports {inside}"


def test_files_and_functions_are_short():
    too_long = []
    for path in source_files(*TOP_LEVEL, "tests"):
        lines = len(path.read_text().splitlines())
        if lines > MAX_FILE_LINES:
            too_long.append(f"{path.relative_to(ROOT)} has {lines} lines, the limit is {MAX_FILE_LINES}")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    too_long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines")
    assert not too_long, "\n".join(too_long)


def test_no_file_is_a_drawer_for_everything():
    vague = [
        str(path.relative_to(ROOT))
        for path in source_files(*TOP_LEVEL, "tests")
        if any(part in FORBIDDEN_NAMES for part in path.stem.split("_"))
    ]
    assert not vague, vague


@dataclass
class ConfigClass:
    """A dataclass of the configuration, as its source tells."""

    fields: dict[str, str]
    """Name and annotation."""
    properties: dict[str, set[str]]
    """Which fields a property hands out."""


def test_the_map_in_the_readme_names_every_file_as_its_docstring_does():
    readme = (ROOT / "README.md").read_text()
    for path in source_files(*TOP_LEVEL):
        if path.name == "__init__.py":
            continue
        name = path.relative_to(ROOT).as_posix().split("/", 1)[1]
        first = (ast.get_docstring(tree_of(path)) or "").split("\n")[0]
        assert f"| `{name}` | {first} |" in readme, f"put the first line of {path} into the map"


@functools.cache
def config_classes() -> dict[str, ConfigClass]:
    classes = {}
    for path in sorted((ROOT / "tml" / "config").glob("*.py")):
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                fields = {
                    item.target.id: ast.unparse(item.annotation)
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                }
                properties = {
                    item.name: fields_handed_out(item, set(fields))
                    for item in node.body
                    if isinstance(item, ast.FunctionDef) and not item.name.startswith("__")
                }
                classes[node.name] = ConfigClass(fields=fields, properties=properties)
    return classes


def fields_handed_out(function: ast.FunctionDef, fields: set[str]) -> set[str]:
    if "vars(self)" in ast.unparse(function):
        return fields
    return {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)} & fields


def holders_of(name: str) -> set[str]:
    """The class and every class through whose fields it can be reached."""
    found = {name}
    while True:
        more = {
            holder
            for holder, config in config_classes().items()
            if any(inner in annotation for inner in found for annotation in config.fields.values())
        }
        if more <= found:
            return found
        found |= more


@functools.cache
def attributes_read(path: Path) -> set[str]:
    return {node.attr for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}


@functools.cache
def config_names_at_hand(path: Path) -> set[str]:
    """Config classes that a file imports; what has an `.experiment` hands out all of them."""
    handed = {"Experiment"} if "experiment" in attributes_read(path) else set()
    return handed | {
        alias.name
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tml.config")
        for alias in node.names
    }


def unread_fields() -> Iterator[str]:
    """Fields that no file reads which could have got hold of their class."""
    readers = [path for path in source_files("tml", "data_pipelines", "launch") if "config" not in path.parts]
    for name, config in config_classes().items():
        holders, read = holders_of(name), set()
        for path in readers:
            if holders & config_names_at_hand(path):
                read |= attributes_read(path)
        for handed_out, fields in config.properties.items():
            if handed_out in read:
                read |= fields
        yield from (f"{name}.{field}" for field in config.fields if field not in read)


def test_every_config_field_is_read():
    assert len(config_classes()) > 10
    unread = list(unread_fields())
    assert not unread, f"read by nobody, so it changes nothing: {unread}"


APPS = sorted(path.stem for path in source_files("launch") if '__name__ == "__main__"' in path.read_text())


@pytest.mark.parametrize("app", APPS)
def test_every_app_has_help(app: str):
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{app}", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    docstring = ast.get_docstring(tree_of(ROOT / "launch" / f"{app}.py"))
    assert done.returncode == 0, done.stderr
    assert docstring is not None
    assert docstring.splitlines()[0] in done.stdout
    assert f"python -m launch.{app}" in done.stdout, "show a command"
    assert "--" in done.stdout
