"""Who may import whom: every arrow of the house falls, from the calls of users down to the kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "scgen"

#: Prefixes of what each part may import of scgen, besides what lies beside it in its own folder; longest key wins.
ALLOWED = {
    "__init__": (),
    "arguments": (),
    "cli": ("__version__", "flags", "h5ad", "integration", "reporting", "models", "data"),
    "integration": ("models", "training", "tuning", "analysis", "data", "plots"),
    "criticism": ("models", "analysis", "data", "plots"),
    "tuning": ("models", "training", "data"),
    "reporting": ("models", "analysis", "data", "plots"),
    "plots": ("canvas", "point_labels"),
    "point_labels": (),
    "canvas": ("atomic",),
    "flags": (),
    "atomic": (),
    "h5ad": ("atomic",),
    "storage": ("atomic",),
    "threads": (),
    "seeding": (),
    "training": ("modules.elbo", "data", "storage"),
    "models": (
        "__version__",
        "analysis",
        "training",
        "modules",
        "data",
        "storage",
        *("models.base", "models.differences", "models.files", "models.loaders", "models.pickles"),
        *("models.queries", "models.scvi_tools", "models.trainings"),
    ),
    "analysis": ("training", "modules", "distributions", "data", "analysis"),
    "modules": ("distributions", "data.cells", "modules.networks", "modules.flows", "modules.elbo"),
    "distributions": ("kernels.dispatch", "kernels.reference", "distributions"),
    "data": ("kernels.dispatch", "data"),
    "data.simulate": ("distributions",),
    "kernels": (),
    "kernels.dispatch": ("kernels",),
    "kernels.cpu": ("kernels.functions", "kernels.genes", "kernels.listing", "kernels.rows"),
    "kernels.genes": ("kernels.functions", "kernels.rows"),
    "kernels.listing": ("kernels.functions", "kernels.rows"),
    "kernels.cuda": ("kernels.cuda_functions",),
    "kernels.functions": ("kernels.rows",),
}
#: Import nothing else of scgen's, and may be imported everywhere.
FOR_ALL = ("scgen.arguments.", "scgen.seeding.", "scgen.threads")
MAY_NAME_ANNDATA = ("data", "models", "analysis", "integration", "criticism", "tuning", "reporting", "cli", "h5ad")
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


def rule(name: str) -> tuple[str, ...]:
    parts = name.removesuffix(".__init__").split(".")
    return next(ALLOWED[key] for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_arrow_falls(path):
    allowed = rule(name_of(path))
    for imported in imports(path):
        if imported.startswith("scgen") and not imported.startswith(FOR_ALL):
            target = imported.removeprefix("scgen").removeprefix(".")
            assert any(target == one or target.startswith(f"{one}.") for one in allowed), f"{name_of(path)} -> {target}"
        if imported.split(".")[0] == "anndata":
            assert name_of(path).split(".")[0] in MAY_NAME_ANNDATA, f"{name_of(path)} names AnnData"


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
