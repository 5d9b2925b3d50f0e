"""Imports point down: from scripts to pipelines, families, shared bodies, attention functions, kernels."""

import ast
from functools import cache
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

#: what may import what: a part imports those below it, and others of its own level as long as there is no circle
LEVELS = (
    {"scripts", "hf_attn.cli", "hf_attn.claims", "hf_attn.comparison", "hf_attn.examples"},
    {"hf_attn", "hf_attn.registration", "hf_attn.auto"},
    {"hf_attn.pipelines"},
    {"hf_attn.modeling", "hf_attn.patching"},
    {
        "hf_attn.analysis",
        "hf_attn.architectures",
        "hf_attn.checkpoints",
        "hf_attn.distributed",
        "hf_attn.restoration",
        "hf_attn.training",
    },
    {"hf_attn.attention", "hf_attn.mixers"},
    {"hf_attn.kernels"},
    {"hf_attn.hub"},
    {"hf_attn._import_hooks", "hf_attn._moved", "hf_attn.catalog", "hf_attn.model_cards"},
)
LEVEL_OF = {part: len(LEVELS) - level for level, parts in enumerate(LEVELS) for part in parts}

#: registration fills the tables of transformers with classes of higher levels, which are imported on access
REGISTERED_LAZILY = ("hf_attn.registration", "hf_attn.auto")


def _module(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("modeling", "pipelines"):
        parts.insert(0, "hf_attn")
    return ".".join(parts).removesuffix(".__init__")


PATHS = {
    _module(path): path
    for folder in ("hf_attn", "modeling", "pipelines", "scripts")
    for path in (ROOT / folder).rglob("*.py")
}


def part_of(module: str) -> str:
    return ".".join(module.split(".")[: 1 if module.startswith("scripts") else 2])


class _Imports(ast.NodeVisitor):
    """The modules of this project that a module imports, in functions too, but not for type checkers alone."""

    def __init__(self, module: str, path: Path):
        self.package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.dump(node.test):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found.update(alias.name for alias in node.names if alias.name in PATHS)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = self.package.split(".")
        base = [*parts[: len(parts) - node.level + 1]] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        if not source.startswith(("hf_attn", "scripts")):
            return
        for alias in node.names:
            name = f"{source}.{alias.name}"
            self.found.add(name if name in PATHS else source)


@cache
def imports(module: str) -> frozenset[str]:
    visitor = _Imports(module, PATHS[module])
    visitor.visit(ast.parse(PATHS[module].read_text(encoding="utf-8")))
    return frozenset(visitor.found - {module})


def test_every_part_has_a_level():
    assert {part_of(module) for module in PATHS} <= set(LEVEL_OF)


@pytest.mark.parametrize("part", sorted(set(LEVEL_OF) - set(REGISTERED_LAZILY)))
def test_imports_point_down(part):
    upward = [
        f"{module} -> {imported}"
        for module in PATHS
        if part_of(module) == part
        for imported in imports(module)
        # The package itself exports names of every level, which are imported on access.
        if imported != "hf_attn" and LEVEL_OF[part_of(imported)] > LEVEL_OF[part]
    ]
    assert not upward, "\n".join(upward)


def test_no_family_imports_a_family():
    family = {module: module.split(".")[2] for module in PATHS if module.startswith("hf_attn.modeling.")}
    across = [f"{a} -> {b}" for a in family for b in imports(a) if b in family and family[a] != family[b]]
    assert not across, "\n".join(across)


def test_no_circles():
    def circle(module: str, path: tuple[str, ...]) -> tuple[str, ...]:
        if module in path:
            return (*path[path.index(module) :], module)
        if module in done or module in ("hf_attn", *REGISTERED_LAZILY):
            return ()
        for imported in imports(module):
            if found := circle(imported, (*path, module)):
                return found
        done.add(module)
        return ()

    done: set[str] = set()
    for module in PATHS:
        found = circle(module, ())
        assert not found, " -> ".join(found)


def test_what_the_checks_would_find(monkeypatch):
    """The scanner sees relative imports, imports of modules from packages, and imports within functions."""
    assert "hf_attn.kernels.sigmoid.blockwise" in imports("hf_attn.attention.sigmoid")
    assert "hf_attn.training.output_folder" in imports("hf_attn.cli.convert")
    assert "hf_attn.architectures.restoration.memory" in imports("hf_attn.pipelines.image_restoration")


def test_no_file_is_large():
    paths = [*PATHS.values(), *(ROOT / "tests").rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert not {path: count for path, count in lines.items() if count >= 600}


def test_every_folder_of_tests_is_a_package():
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]
