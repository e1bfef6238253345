"""Pictures are drawn whatever the categories are."""

from types import SimpleNamespace

import matplotlib.colors
import matplotlib.image
import numpy as np
import pandas as pd
import pytest

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


@pytest.mark.parametrize("covered", [True, False])
def test_posterior_predictive(tmp_path, covered):
    rng = np.random.default_rng(0)
    mean = np.append(rng.gamma(1, 2, 300), 0)  # the last gene is not expressed
    means, variances, zeros = mean, mean + mean**2, np.exp(-mean)
    shifted = {"observed": 1, "replicated": 1.3, "lower": 0.5 if covered else 1.2, "upper": 1.5}
    genes = pd.DataFrame(
        {
            f"{name}_{kind}": values * factor
            for name, values in {"mean": means, "variance": variances, "zero_share": zeros}.items()
            for kind, factor in shifted.items()
        }
    )
    cells = pd.DataFrame({f"library_{kind}": rng.gamma(9, 200, 50) * factor for kind, factor in shifted.items()})
    plots.posterior_predictive(tmp_path / "check.png", SimpleNamespace(genes=genes, cells=cells))
    picture = matplotlib.image.imread(tmp_path / "check.png")[..., :3]
    red = (np.abs(picture - matplotlib.colors.to_rgb("tab:red")).max(-1) < 0.02).reshape(-1, picture.shape[1])
    thirds = [part.sum() for part in np.array_split(red, 3, axis=1)]
    assert picture.shape[1] > 2.5 * picture.shape[0]
    assert (thirds[0] > 300) == (not covered)  # in the legend alone, or for the genes
    assert thirds[1] < 20
