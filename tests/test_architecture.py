"""Who may import whom: imports go from the calls of users down to the kernels, never up."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "scgen"

#: Prefixes of what each part may import of scgen. The rule for a file is that of the longest key that fits.
ALLOWED = {
    "__init__": ("plots", "data", "analysis", "evaluation", "models", "workflows"),  # names alone, for type checkers
    "arguments": (),
    "cli": ("command", "reporting", "workflows", "models", "data"),
    "command": (),
    "command.parser": ("__version__", "command.flags"),
    "command.h5ad": ("atomic",),
    "workflows": ("workflows", "models", "training", "evaluation", "data"),
    "evaluation": ("models", "analysis", "data"),
    "reporting": ("models", "evaluation", "data", "plots", "workflows"),
    "reporting.canvas": ("atomic",),
    "reporting.point_labels": (),
    "reporting.tissue": ("reporting.canvas", "data"),
    "plots": ("reporting.canvas", "reporting.point_labels", "reporting.tissue"),
    "atomic": (),
    "storage": ("atomic",),
    "threads": (),
    "seeding": (),
    "training": ("data", "distributions", "training"),
    "models": (
        *("__version__", "analysis", "training", "modules", "data", "storage", "models.base", "models.differences"),
        *("models.expression", "models.files", "models.interop", "models.loaders", "models.queries", "models.summary"),
        *("models.tissue", "models.trainings"),
    ),
    "analysis": ("modules", "distributions", "data", "analysis"),
    "modules": ("distributions", "data.cells", "modules.networks", "modules.flows", "modules.elbo"),
    "modules.niches": ("distributions", "modules.networks", "modules.places", "modules.posteriors"),
    "modules.maps": ("distributions", "modules.networks", "modules.places", "modules.posteriors"),
    "modules.places": ("distributions", "data.cells", "modules.networks", "modules.decoders"),
    "distributions": ("kernels.dispatch", "kernels.reference", "distributions"),
    "data": ("kernels.dispatch", "data"),
    "data.simulate": ("distributions",),
    "kernels": (),
    "kernels.dispatch": ("kernels.reference",),
    "kernels.cpu.likelihood": tuple(f"kernels.cpu.{name}" for name in ("functions", "genes", "listing", "rows")),
    "kernels.cpu.genes": ("kernels.cpu.functions", "kernels.cpu.rows"),
    "kernels.cpu.listing": ("kernels.cpu.functions", "kernels.cpu.rows"),
    "kernels.cpu.functions": ("kernels.cpu.rows",),
    "kernels.cuda.likelihood": ("kernels.cuda.functions",),
}
#: Import nothing else of scgen's, and may be imported everywhere.
FOR_ALL = ("scgen.arguments.", "scgen.seeding.", "scgen.threads")
MAY_NAME_ANNDATA = ("data", "models", "analysis", "workflows", "evaluation", "reporting", "command")
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path):
    """Yield every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            # What is imported may be a module of a package, or a name in a module: the longer name serves both.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> list[str]:
    """Return what a file imports of scgen, without "scgen." in front, but for what everything may import."""
    found = (name for name in imports(path) if name.startswith("scgen") and not name.startswith(FOR_ALL))
    return [name.removeprefix("scgen").removeprefix(".") for name in found]


def is_part(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def key_of(name: str) -> str:
    """Return the key of the rule for a file."""
    parts = name.removesuffix(".__init__").split(".")
    return next(key for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in ALLOWED)


def rule(name: str) -> tuple[str, ...]:
    return ALLOWED[key_of(name)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_arrow_falls(path):
    for target in own_imports(path):
        assert any(is_part(target, one) for one in rule(name_of(path))), f"{name_of(path)} -> {target}"
    if any(is_part(imported, "anndata") for imported in imports(path)):
        assert name_of(path).split(".")[0] in MAY_NAME_ANNDATA, f"{name_of(path)} names AnnData"


@pytest.mark.parametrize("key", ALLOWED)
def test_every_rule_is_used(key):
    files = [path for path in FILES if key_of(name_of(path)) == key]
    assert files, f"no file is under the rule {key!r}"
    used = [target for path in files for target in own_imports(path)]
    unused = [one for one in ALLOWED[key] if not any(is_part(target, one) for target in used)]
    assert not unused, f"{key} may import {unused}, but does not"


@pytest.mark.parametrize("part", MAY_NAME_ANNDATA)
def test_every_part_that_may_name_anndata_does(part):
    files = [path for path in FILES if is_part(name_of(path), part)]
    assert any(is_part(imported, "anndata") for path in files for imported in imports(path))


def test_the_rules_would_notice():
    assert "models" not in rule("modules.vae")
    assert rule("data.simulate") == ("distributions",)
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_room_without_a_name(path):
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    tree = ast.parse(path.read_text())
    documented = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    strings = [n.body[0] for n in documented if n.body and ast.get_docstring(n)]
    code = len(tree.body and path.read_text().splitlines()) - sum(s.end_lineno - s.lineno + 1 for s in strings)
    assert code <= 320, f"{path} is too long to read at a sitting"
