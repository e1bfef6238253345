"""Pictures are drawn whatever the categories are."""

from types import SimpleNamespace

import matplotlib.colors
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import scgen
from scgen import plots


@pytest.mark.parametrize("n_categories", [1, 10, 20, 60])
def test_maps(tmp_path, n_categories):
    xy = np.random.default_rng(0).normal(size=(200, 2))
    xy[3] = np.nan
    labels = pd.Series(np.resize([f"c{i}" for i in range(n_categories)], 200), dtype="category")
    labels[7] = np.nan
    plots.scatters(tmp_path / "maps.png", {"before": xy, "after": -xy}, {"label": labels, "number": labels.cat.codes})
    picture = matplotlib.image.imread(tmp_path / "maps.png")
    assert picture.shape[1] > picture.shape[0] > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > n_categories  # a colour for each


@pytest.mark.parametrize("n_epochs", [1, 50])
@pytest.mark.parametrize("validation", [True, False])
def test_training_curve(tmp_path, n_epochs, validation):
    history = pd.DataFrame({"elbo_train": np.linspace(-900, -800, n_epochs)}, index=range(1, n_epochs + 1))
    if validation:
        history["elbo_validation"] = history["elbo_train"] - 5
    plots.training_curve(tmp_path / "curve.png", history)
    assert matplotlib.image.imread(tmp_path / "curve.png").std() > 0.01


@pytest.mark.parametrize("n_comparisons", [1, 4])
def test_volcano(tmp_path, n_comparisons):
    lfc = np.linspace(-3, 3, 40)
    table = pd.DataFrame(
        {"lfc_mean": lfc, "bayes_factor": 5 * abs(lfc) - 5, "delta": 0.25, "is_de_fdr_0.1": abs(lfc) > 2},
        index=[f"gene_{i}" for i in range(40)],
    )
    several = pd.concat([table.assign(comparison=f"{i} vs rest") for i in range(n_comparisons)])
    plots.volcano(tmp_path / "volcano.png", several)
    picture = matplotlib.image.imread(tmp_path / "volcano.png")
    assert picture.std() > 0.01
    assert (picture.shape[1] > 1.5 * picture.shape[0]) == (n_comparisons == 4)
    with pytest.raises(ValueError, match=r"mode=.change"):
        plots.volcano(tmp_path / "none.png", several.drop(columns="is_de_fdr_0.1"))


def points(axes) -> tuple[np.ndarray, np.ndarray]:
    """Return position and colour of all that was scattered, (n, 2) and (n, 3)."""
    xy = [collection.get_offsets().data for collection in axes.collections]
    colours = [
        np.broadcast_to(collection.get_facecolors(), (len(of), 4)) if len(of) else np.empty((0, 4))
        for collection, of in zip(axes.collections, xy, strict=True)
    ]
    return np.concatenate(xy), np.concatenate(colours)[:, :3]


def in_order(*columns) -> np.ndarray:
    rows = np.column_stack(columns)
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("covered", [True, False])
def test_posterior_predictive(tmp_path, monkeypatch, covered):
    rng = np.random.default_rng(0)
    mean = np.append(rng.gamma(1, 2, 300), 0)  # the last gene is not expressed
    values = {"mean": mean, "variance": mean + mean**2, "zero_share": np.exp(-mean)}

    def table(name, of):
        return pd.DataFrame({f"{name}_observed": of, f"{name}_replicated": 1.3 * of, f"{name}_within": covered})

    library = rng.gamma(9, 200, 50)
    genes = pd.concat([table(name, of) for name, of in values.items()], axis=1)
    check = SimpleNamespace(genes=genes, cells=table("library", library))
    check.cells.loc[:9, "library_within"] = not covered
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *of, **how: figures.append(figure) or save(figure, *of, **how)
    )
    plots.posterior_predictive(tmp_path / "check.png", check)
    picture = matplotlib.image.imread(tmp_path / "check.png")
    assert picture.shape[1] > 2.5 * picture.shape[0]
    zeros, variances, libraries = figures[0].axes
    grey, red, orange = (np.array(matplotlib.colors.to_rgb(name)) for name in ("0.45", "tab:red", "tab:orange"))
    xy, colours = points(zeros)
    share = values["zero_share"]
    np.testing.assert_allclose(in_order(xy), in_order(share, 1.3 * share))
    assert (colours == (grey if covered else red)).all()
    xy, colours = points(libraries)
    np.testing.assert_allclose(in_order(xy), in_order(library, 1.3 * library))
    first = np.isin(xy[:, 0], library[:10])
    assert (colours[first] == (red if covered else grey)).all()
    assert (colours[~first] == (grey if covered else red)).all()
    xy, colours = points(variances)
    for colour, factor in ((grey, 1), (orange, 1.3)):
        of = (colours == colour).all(1)
        expected = in_order(factor * values["mean"][:300], factor * values["variance"][:300])
        np.testing.assert_allclose(in_order(xy[of]), expected)
    assert len(xy) == 600


def test_a_check_of_one_cell_is_drawn(tmp_path, trained):
    check = scgen.posterior_predictive_check(trained, indices=[0], n_samples=3)
    plots.posterior_predictive(tmp_path / "one.png", check)
    assert matplotlib.image.imread(tmp_path / "one.png").std() > 0.01
