"""Every tutorial is stored executed. Run again, it prints the same words, and what it claims is true."""

import re
import shutil
from pathlib import Path

import anndata
import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from sklearn.metrics import adjusted_rand_score

TUTORIALS = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
BLOOD_CELLS = Path(__file__).parents[2] / "shared/data/pbmc3k.h5ad"


def numbers(text: str, pattern: str) -> list[float]:
    """Return the numbers in the one line of the text that is like the pattern, in which # stands for a number."""
    found = re.findall(re.escape(pattern).replace(r"\#", r"(-?\d+(?:\.\d+)?)"), text)
    assert len(found) == 1, f"{pattern}: found {len(found)} times"
    return [float(number) for number in ([found[0]] if isinstance(found[0], str) else found[0])]


def integrate_batches(text: str):
    before, after, full = numbers(text, "# before, # after; # if")
    assert before < 0.5 * full
    assert after > 0.85 * full
    assert numbers(text, "Rand index): #")[0] > 0.9
    assert "the same embedding: True" in text


def differential_expression(text: str):
    """The truth is the simulation's; of the null, that nothing differs; the bounds leave room for other machines."""
    _, called, false = numbers(text, "type_1 against the rest: # genes differ, # are called, # of them falsely")
    assert called > 100
    assert false < 0.12 * called
    assert numbers(text, "correlation of lfc_mean with the true fold change: #")[0] > 0.93
    assert numbers(text, "false discovery rate #, at a target")[0] < 0.07
    assert numbers(text, "found: # of the")[0] > 0.8
    assert 0.8 < numbers(text, "lfc_mean ± 2 lfc_std: # of them")[0] < 0.96
    line = ": # genes differ, # are called, # of them"
    found = [numbers(text, f"delta {delta}{line}") for delta in ("0.25", "0.5", "1.0")]
    for differ, called, false in found:
        assert 0.5 * differ < called < 1.1 * differ
        assert false < 0.1 * called
    assert found[0][1] > found[1][1] > found[2][1]
    line = ": # genes are called, false discovery rate #, correlation with the true change #"
    corrected, kept = (numbers(text, f"batch_correction={one}{line}") for one in (True, False))
    assert corrected[0] > 80
    assert corrected[1] < 0.08
    assert corrected[2] > 0.95
    assert kept[1] > 0.15
    assert kept[2] < 0.8
    assert numbers(text, "halvings of a type: # of 3000")[0] <= 3
    assert numbers(text, "batch_correction=False: # of 300")[0] > 100
    assert numbers(text, "batch_correction=True: # of 300")[0] <= 3
    assert numbers(text, "six donors' sums, tested: # of 300")[0] <= 3


def map_new_cells(text: str):
    """The truth is the simulation's: cell types, and which of them the reference was not shown."""
    right, unknown = numbers(text, "labels at once: # are right, # unknown")
    assert right > 0.93
    assert unknown < 0.05
    before, after = numbers(text, "ELBO of the new cells: # at once, # trained")
    assert after > before + 3
    assert numbers(text, "labels after training: # are right")[0] > 0.93
    assert "the reference's embedding has the same bits: True" in text
    assert "trained query's embedding have the same bits: True" in text
    assert max(numbers(text, '"unknown": # of the unseen type, # of the others')) < 0.3  # which is what it warns of
    assert numbers(text, "AUROC of typicality, unseen against known types: #")[0] > 0.95
    unseen, others = numbers(text, "\nbelow 0.05: # of the unseen type, # of the others")
    assert unseen > 0.9
    assert others < 0.2
    assert numbers(text, "new batch: below 0.05: # of")[0] < 0.15
    typicality, density = numbers(text, "AUROC in the new batch: # of typicality, # of density")
    assert density > 0.95
    assert typicality > 0.9


def variational_inference(text: str):
    """The truth is in closed form, by quadrature, or scikit-learn's maximum of the same likelihood."""
    assert numbers(text, "log p(x) - (ELBO + KL): at most #")[0] < 1e-9
    assert numbers(text, "draws - ELBO: at most #")[0] < 0.15  # of 10,000 draws that spread over some nats
    for d in (1, 10, 100):  # of 50,000 draws, times d components
        exact = {"reparametrised": 4, "score function": 30 + 22 * (d - 1) + 4 * (d - 1) ** 2}
        for name, variance in (exact | {"with baseline": 14 + 6 * (d - 1)}).items():
            gradient, found = numbers(text, f"d={d}, {name}: gradient #, variance #")
            assert abs(gradient - 2) < 4 * (variance / 50_000) ** 0.5
            assert found == pytest.approx(variance, rel=0.12)
    found = {}
    for name in ("together", "in turn, 1 step", "in turn, 100 steps"):
        elbo, log_p, kl = numbers(text, f"{name}: below the maximum: ELBO #, log p(x) #; KL #")
        assert elbo == pytest.approx(log_p + kl, abs=2e-4)
        assert min(elbo, log_p, kl) > -1e-4
        found[name] = elbo, numbers(text, f"{name}: steps with the ELBO within 0.1: # of")[0]
    assert found["together"][0] < 0.02
    assert found["in turn, 1 step"][0] < 0.05
    assert found["together"][1] > found["in turn, 1 step"][1] > found["in turn, 100 steps"][1]
    (exact,) = numbers(text, "log p(x), exact: #")
    draws = (1, 10, 100, 1000, 10_000)
    names = ("prior", "worse q", "trained q")
    rows = {name: [numbers(text, f"{name}, K={k}: #, error of a cell #, ESS #") for k in draws] for name in names}
    assert rows["prior"][0][0] < exact - 10
    assert rows["prior"][1][0] < exact - 1
    assert all(abs(rows[name][-1][0] - exact) < 0.05 for name in names)
    assert all(error < 0.1 for _, error, _ in rows["trained q"])
    for k, prior, worse, trained in zip(draws[1:], *(rows[name][1:] for name in names), strict=True):
        assert prior[2] < worse[2] < trained[2] <= k
        assert prior[1] > worse[1] > trained[1]
    assert rows["prior"][-1][2] < 0.1 * draws[-1] < 0.98 * draws[-1] < rows["trained q"][-1][2]
    (floor,) = numbers(text, "-log Z by quadrature: #")
    assert floor == pytest.approx(-1.8775, abs=1e-3)  # SciPy's dblquad says so, too (tests/test_variational.py)
    kl = {}
    for name in ("Gaussian", "planar", "inverse autoregressive"):
        energy, error, kl[name] = numbers(text, f"{name}: free energy # (standard error #), KL #")
        assert energy > floor - 4 * error
        assert numbers(text, f"{name}: the density in the picture integrates to #")[0] == pytest.approx(1, abs=0.03)
    assert kl["planar"] < 0.15
    assert kl["inverse autoregressive"] < 0.4 < 2 < kl["Gaussian"]


def niches_of_tissue(text: str):
    """The truth is the simulation's: the arrangement and the angle of each disc, and that all have the same types."""
    line = ": nearest neighbours #, logistic regression #"
    found = {name: numbers(text, f"{name}{line}") for name in ("composition", "mean", "pool", "gradient")}
    for name in ("composition", "mean", "pool"):
        assert max(found[name]) < 0.4  # by chance: 0.25
    model = numbers(text, f"SpatialVAE{line}")
    assert min(model) > max(found["gradient"])
    for name in ("sections 1 and 2", "section 3"):
        assert numbers(text, f"{name}: adjusted Rand index of clusters and niches #")[0] > 0.7
    assert numbers(text, "centres of section 3 with the right niche: #")[0] > 0.85
    for kind in ("sectors", "mirrored", "bands 1|2|3"):
        assert numbers(text, f"{kind}: #")[0] > 0.9
    assert numbers(text, "mixed: #")[0] < 0.4  # of about a hundred random angles
    change, spread = numbers(text, "largest change of z #, where its standard deviation is up to #")
    assert change < 0.01 * spread
    assert numbers(text, "turned with the section, up to # radians")[0] < 0.01


def niches_by_layers(text: str):
    """The truth is the simulation's: the layer of each cell, and that the sections lie differently."""
    line = ": nearest neighbours #, logistic regression #"
    names = ["mean of SCVI", "gradient of SCVI", "pool of SCVI"]
    averages = [numbers(text, f"{name}{line}") for name in names]
    model, types = numbers(text, f"SpatialVAE{line}"), numbers(text, f"composition of true types{line}")
    for of_model, of_types, *others in zip(model, types, *averages, strict=True):
        assert of_types > of_model
        assert of_model > max(others) - 0.05  # the text says that they are about equal
        assert others[1] < others[2] + 0.02  # gradients are no better than what ignores the arrangement
    assert numbers(text, "adjusted Rand index of niches and layers: #")[0] > 0.5
    assert "the same embedding: True" in text
    assert numbers(text, "cells of the new section with the right layer: #")[0] > 0.7


#: The types that blood_cells names, by the labels that the authors of Seurat gave the same cells.
SEURAT = {
    "Naive CD4 T": "CD4 T",
    "Memory CD4 T": "CD4 T",
    "CD8 T": "CD8 T",
    "NK": "NK",
    "B": "B",
    "CD14+ Mono": "CD14 monocyte",
    "FCGR3A+ Mono": "FCGR3A monocyte",
    "DC": "dendritic",
    "Platelet": "platelet",
}


def blood_cells(text: str):
    text = re.sub(" +", " ", text)  # the columns of tables
    assert numbers(text, "# cells, # genes that at least 3 cells have") == [2700, 13714]
    assert numbers(text, "\n# cells are kept") == [2643]
    assert "the same embedding: True" in text
    found = {name: numbers(text, f"\n{name} #")[0] for name in SEURAT.values()}
    assert sum(found.values()) == 2643
    # The cells with each of Seurat's labels, and the room that is left for other clusters than theirs: T cells of the
    # two kinds have much in common, and a few monocytes more or less make a great difference to 32 dendritic cells.
    for name, n, room in (
        ("CD4 T", 697 + 483, 0.15),
        ("CD8 T", 271, 0.5),
        ("NK", 155, 0.3),
        ("B", 344, 0.1),
        ("CD14 monocyte", 480, 0.15),
        ("FCGR3A monocyte", 162, 0.2),
        ("dendritic", 32, 0.8),
        ("platelet", 14, 0.5),
    ):
        assert found[name] == pytest.approx(n, rel=room), name


def agreement_with_seurat(folder: Path) -> float:
    """Return the adjusted Rand index of the types that the tutorial wrote into the folder."""
    labels = anndata.read_h5ad(BLOOD_CELLS).obs["cell_type"].map(SEURAT).dropna()
    named = anndata.read_h5ad(folder / "data/blood_cells.h5ad").obs["cell_type"]
    both = named.index.intersection(labels.index)
    assert len(both) > 2500
    return adjusted_rand_score(labels[both].astype(str), named[both].astype(str))


CLAIMS = {
    check.__name__: check
    for check in (
        *(integrate_batches, differential_expression, map_new_cells, variational_inference, blood_cells),
        *(niches_of_tissue, niches_by_layers),
    )
}


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook) -> str:
    return "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)


def words(cell) -> set[str]:
    """Return the words of a cell's output, without digits, and the kinds of its results.

    Digits differ between machines, and with them the order of rows. Warnings depend on the versions of libraries.
    """
    found = set()
    for output in cell.outputs:
        if output.output_type == "stream":
            text = output.text if output.name == "stdout" else ""
        else:
            text = output.data["text/plain"]
            found |= output.data.keys()
        # A number goes with its unit of time: a slow machine needs minutes.
        found |= set(re.findall(r"[^\W\d]+", re.sub(r"\d[\d.,]*(?:e[-+]\d+)?(?: (?:s|min)\b)?", " ", text)))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_executed(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    # umap-learn warns if ipywidgets is missing: install it before you store outputs.
    assert {output.name for output in outputs if output.output_type == "stream"} <= {"stdout"}
    CLAIMS[path.stem](printed(notebook))
    pictures_of_cells = ("blood_cells", "niches_of_tissue", "niches_by_layers")
    assert path.stat().st_size < (600_000 if path.stem in pictures_of_cells else 300_000)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    if path.stem == "blood_cells":
        if not BLOOD_CELLS.exists():
            pytest.skip("no ../shared/data/pbmc3k.h5ad, which takes the place of the file that Scanpy downloads")
        (tmp_path / "data").mkdir()
        cells = anndata.read_h5ad(BLOOD_CELLS)
        names = {"obs": pd.DataFrame(index=cells.obs_names), "var": pd.DataFrame(index=cells.var_names)}
        anndata.AnnData(cells.X, **names).write_h5ad(tmp_path / "data/pbmc3k_raw.h5ad")
    for module in TUTORIALS.glob("*.py"):
        shutil.copy(module, tmp_path)
    notebook = nbformat.read(path, as_version=4)
    stored = [words(cell) for cell in code_cells(notebook)]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    CLAIMS[path.stem](printed(notebook))
    assert [words(cell) for cell in code_cells(notebook)] == stored
    if path.stem == "blood_cells":
        assert agreement_with_seurat(tmp_path) > 0.8
