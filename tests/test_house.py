"""Structural rules, checked on the source: import order, function length, public names."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# The layout of docs/architecture.md, from the top down. A folder stands for all files in it. A
# module imports from lower lines and from its own folder.
RANKS = [
    {"examples"},
    {"main"},
    {"benchmarks"},
    {"cli"},
    {"webapp"},
    {"train"},
    {"training"},
    {"evaluate"},
    {"outputs"},
    {"lite_runtime.browser"},
    {"lite_runtime.export"},
    {"lite_runtime.quantize"},
    {"lite"},
    {"lite_runtime"},
    {"tracking"},
    {"videomatch"},
    {"tracking.tracker"},  # imports no network, so that `videomatch.load_tracker` can return one
    {"network"},
    {"davis"},
    {"datasets"},
    {"preprocess"},
    {"metrics"},
    {"masks"},
    {"media"},
    {"system"},
]
TORCH = {"torch", "torchvision"}
FILES = {"PIL", "av", "glob", "io", "json", "os", "pathlib", "pickle", "shutil", "tempfile",
         "urllib", "zipfile"}
FORBIDDEN = {"network": FILES, "media": TORCH, "masks": TORCH,
             **dict.fromkeys(("webapp.server", "webapp.store"), TORCH)}
# A function of more lines than a screen holds does too much; a module with more public names than
# this is several modules. Files may be long: related code stays together.
FUNCTION_LINES, PUBLIC_NAMES = 65, 28

# What breaks a rule today. The list must shrink: an entry that is no longer needed fails.
IMPORTS = {
    ("network.checkpoint", "io"), ("network.checkpoint", "pathlib"),  # reads and writes checkpoints
    ("network.encoder", "pathlib"),  # reads ImageNet weights, from a file or torch.hub
}

TREES = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
         for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")])
         if not any((parent / "pyvenv.cfg").exists() for parent in path.parents)}
CODE = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): tree
        for path, tree in TREES.items() if path.parts[0] != "tests"}


def imported(name: str, tree: ast.Module, modules=CODE) -> set[str]:
    """Imports anywhere in a module: ours by full name, others by their first component."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: name the module instead of `from .`"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {full if full in modules else node.module for full in names}
    return {full if full in modules else full.split(".")[0] for full in found}


def rank(name: str) -> int | None:
    """The index of a module's line in RANKS; None if it has none."""
    for wanted in (name, name.split(".")[0]):
        for i, line in enumerate(RANKS):
            if wanted in line:
                return i
    return None


def upwards(modules: dict[str, ast.Module]) -> set[tuple[str, str]]:
    """Imports that don't go down: to a higher line, or to another module or folder of the same."""
    def down(name: str, other: str) -> bool:
        folder, _, module = name.partition(".")
        same_folder = bool(module) and other.startswith(f"{folder}.")
        return rank(other) > rank(name) or (rank(other) == rank(name) and same_folder)

    return {(name, other) for name, tree in modules.items()
            for other in imported(name, tree, modules) & modules.keys()
            if not down(name, other)}


def forbidden(modules: dict[str, ast.Module]) -> set[tuple[str, str]]:
    return {(name, other) for name, tree in modules.items()
            for other in imported(name, tree, modules)
            & FORBIDDEN.get(name, FORBIDDEN.get(name.split(".")[0], set()))}


def circle(modules: dict[str, ast.Module]) -> list[str]:
    """An import cycle, with the first module again at the end; [] if there is none."""
    graph = {name: imported(name, tree, modules) & modules.keys()
             for name, tree in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def long_functions(trees: dict[Path, ast.Module]) -> dict[str, int]:
    """Functions of more than `FUNCTION_LINES`, not counting their docstrings."""
    def lines(node: ast.AST) -> int:
        length = node.end_lineno - node.lineno + 1
        first = node.body[0]
        if ast.get_docstring(node) is not None:
            length -= first.end_lineno - first.lineno + 1
        return length

    lengths = {f"{path}: {node.name}": lines(node)
               for path, tree in trees.items() for node in ast.walk(tree)
               if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return {name: length for name, length in lengths.items() if length > FUNCTION_LINES}


def public_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {name.id for target in node.targets for name in ast.walk(target)
                      if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_every_module_has_a_rank():
    unranked = [name for name in CODE if rank(name) is None]
    assert not unranked, (f"{', '.join(unranked)}: put it into a line of RANKS (tests/test_house"
                          ".py), below all that import it and above all that it imports, and into "
                          "the table of docs/architecture.md")


def test_imports_only_go_down():
    assert upwards(CODE) | forbidden(CODE) == IMPORTS, (
        "more than IMPORTS has: an import that goes up, or within a line, or that the folder may "
        "not know; fewer: take it out of IMPORTS")


def test_imports_are_acyclic():
    assert not circle(CODE)


@pytest.mark.parametrize("path", TREES, ids=str)
def test_every_module_has_a_docstring(path):
    assert ast.get_docstring(TREES[path])


def test_functions_are_short():
    assert not long_functions(TREES)


def test_modules_have_few_public_names():
    crowded = {name: len(public_names(tree)) for name, tree in CODE.items()}
    assert not {name: n for name, n in crowded.items() if n > PUBLIC_NAMES}


def test_long_functions_and_crowded_modules_are_detected():
    body = "\n".join(["    pass"] * FUNCTION_LINES)
    trees = {Path("a.py"): ast.parse(f"def f():\n{body}\n\nclass C:\n    def g(self): ...")}
    assert long_functions(trees) == {"a.py: f": FUNCTION_LINES + 1}
    assert public_names(ast.parse("A, _b = 1, 2\ndef f(): ...\nclass C: ...")) == {"A", "f", "C"}


def parsed(**sources: str) -> dict[str, ast.Module]:
    return {name.replace("__", "."): ast.parse(source) for name, source in sources.items()}


@pytest.mark.parametrize("importer, source, other", [
    ("tracking.pipeline", "import evaluate", "evaluate"),  # up
    ("davis", "def f():\n    from videomatch import VideoMatch", "videomatch"),  # in a function
    ("davis", "from training import samples", "training.samples"),
    ("datasets.demo", "from training.samples import Pairs", "training.samples"),
    ("network.search", "from tracking import pipeline", "tracking.pipeline"),
    ("media.video", "import network.encoder as e", "network.encoder"),
    ("media.video", "import preprocess", "preprocess")])
def test_upward_imports_are_detected(importer, source, other):
    modules = {other: ast.parse(""), importer: ast.parse(source)}
    assert upwards(modules) == {(importer, other)}


@pytest.mark.parametrize("importer, source, other", [
    ("tracking.pipeline", "from tracking.presence import Presence", "tracking.presence"),
    ("network.sets", "from network.matching import Grid", "network.matching"),
    ("datasets.demo", "from media import images", "media.images"),
    ("training.samples", "from training import warps", "training.warps"),
    ("davis", "from datasets import download", "datasets.download")])
def test_downward_imports_are_allowed(importer, source, other):
    modules = {other: ast.parse(""), importer: ast.parse(source)}
    assert not upwards(modules) and imported(importer, modules[importer], modules) == {other}


def test_forbidden_imports_are_detected():
    modules = parsed(media__video="import torch.nn.functional as F\nimport numpy",
                     network__search="from os.path import join", train="import torch, os")
    assert forbidden(modules) == {("media.video", "torch"), ("network.search", "os")}


def test_cyclic_imports_are_detected():
    modules = parsed(network__a="from network import b", network__b="import network.c",
                     network__c="from network.a import f", network__d="import network.a")
    assert set(circle(modules)) == {"network.a", "network.b", "network.c"}
    assert not circle(parsed(network__a="from network import b", network__b=""))
