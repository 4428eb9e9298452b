"""Which module of the package imports which: without a circle, and only downwards.

Imports inside of functions count too; those for annotations alone (`if TYPE_CHECKING:`) do not.
"""

import ast
from pathlib import Path

import pytest

import hqq_cpp

ROOT = Path(hqq_cpp.__file__).resolve().parent

# Lowest first. A module imports from its own layer and from those before it. Modules at the top of
# the package are in the first layer unless they are named.
LAYERS = (
    (),
    ("backends",),
    ("nn",),
    ("find",),
    ("importance",),
    ("models",),
    ("peft",),
    ("transformers", "diffusers"),
    ("__init__", "_cli", "numpy_linear"),
)


def modules_of(root):
    """Name of a module, from the root on -> its file. The module of a folder has the folder's
    name."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        *folders, last = file.relative_to(root).with_suffix("").parts
        parts = folders if last == "__init__" and folders else [*folders, last]
        found[".".join(parts)] = file
    return found


def is_for_annotations(node):
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def walk(node):
    """All nodes below one that run."""
    for child in ast.iter_child_nodes(node):
        if is_for_annotations(child):
            for other in child.orelse:
                yield other
                yield from walk(other)
            continue
        yield child
        yield from walk(child)


def imports_of(name, file, modules):
    """Modules of the package that a module imports."""
    is_folder = file.name == "__init__.py"
    package = [] if name == "__init__" else name.split(".")
    package = package if is_folder else package[:-1]
    for node in walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            dotted = [alias.name.partition("hqq_cpp.")[2] for alias in node.names]
            yield from (one for one in dotted if one in modules)
        if not isinstance(node, ast.ImportFrom):
            continue
        home = (node.module or "").split(".") if node.module else []
        if node.level:
            home = package[: len(package) - node.level + 1] + home
        elif home[:1] == ["hqq_cpp"]:
            home = home[1:]
        else:
            continue
        for alias in node.names:
            inner = ".".join([*home, alias.name])
            outer = ".".join(home)
            if inner in modules:
                yield inner
            elif outer in modules:
                yield outer


def graph_of(root):
    modules = modules_of(root)
    return {name: {*imports_of(name, file, modules)} - {name} for name, file in modules.items()}


def circle_in(graph):
    """The modules of a circle in order, or []."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        path.append(name)
        for other in sorted(graph[name]):
            if found := visit(other):
                return found
        path.pop()
        done.add(name)
        return []

    return next((found for name in graph if (found := visit(name))), [])


def layer_of(name):
    first = name.partition(".")[0]
    return next((rank for rank, layer in enumerate(LAYERS) if first in layer), 0)


def upward_in(graph):
    """Imports from a higher layer."""
    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in sorted(others)
        if layer_of(other) > layer_of(name)
    ]


def test_the_package_has_no_circle():
    graph = graph_of(ROOT)
    # A package that is not found would have no circle either.
    assert "importance.collect" in graph["models.quantize"]
    assert circle_in(graph) == []


def test_imports_go_down():
    assert upward_in(graph_of(ROOT)) == []


def test_every_folder_has_a_layer():
    folders = {name.partition(".")[0] for name in modules_of(ROOT) if "." in name}
    assert folders <= {folder for layer in LAYERS for folder in layer}


def write(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return graph_of(root)


@pytest.mark.parametrize(
    "back",
    [
        "from ..models.a import A",
        "from ..models import a",
        "def f():\n    from ..models import a",
        "import hqq_cpp.models.a",
        "from hqq_cpp.models import a",
    ],
)
def test_a_circle_is_found(tmp_path, back):
    graph = write(tmp_path, {"models/a.py": "from ..nn import b", "nn/b.py": back})
    assert circle_in(graph) in (["models.a", "nn.b"], ["nn.b", "models.a"])
    assert upward_in(graph) == ["nn.b imports models.a"]


def test_annotations_make_no_circle(tmp_path):
    back = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..models import a"
    graph = write(tmp_path, {"models/a.py": "from ..nn import b", "nn/b.py": back})
    assert circle_in(graph) == [] and upward_in(graph) == []
