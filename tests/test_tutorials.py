"""Every tutorial runs from top to bottom, and says what it claims; so do the outputs that it is stored with."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[1] / "tutorials"


def numbers(text: str, pattern: str) -> list[float]:
    """Return the numbers in the one line of the text that is like the pattern, in which # stands for a number."""
    found = re.findall(re.escape(pattern).replace(r"\#", r"(-?\d+(?:\.\d+)?)"), text)
    assert len(found) == 1, f"{pattern}: found {len(found)} times"
    return [float(number) for number in ([found[0]] if isinstance(found[0], str) else found[0])]


def integrate_batches(text: str):
    before, after, full = numbers(text, "# before, # after; # if")
    assert before < 0.5 * full
    assert after > 0.85 * full
    assert numbers(text, "Rand index): #")[0] > 0.7


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


CLAIMS = {
    check.__name__: check
    for check in (integrate_batches, differential_expression, map_new_cells, variational_inference)
}


def printed(notebook) -> str:
    return "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )


@pytest.mark.parametrize("path", sorted(TUTORIALS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_runs(path):
    notebook = nbformat.read(path, as_version=4)
    stored = printed(notebook)
    if stored:
        CLAIMS[path.stem](stored)
        assert path.stat().st_size < 300_000
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    CLAIMS[path.stem](printed(notebook))
