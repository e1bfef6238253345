"""Posterior-predictive checks, against models that are the truth, brute force, and likelihoods that do not fit."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch import nn

import scgen
from scgen.distributions import CellCounts, PointMass
from scgen.modules.priors import LibraryPrior, StandardNormalPrior
from scgen.modules.vae import VAE


class Known(nn.Module):
    """A latent whose value of each cell is known."""

    def __init__(self, values: np.ndarray):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float32))

    def forward(self, cells):
        return PointMass(self.values[cells.index])


class Truth(nn.Module):
    """The decoder that simulated the cells; z is their rho."""

    def __init__(self, var: pd.DataFrame):
        super().__init__()
        self.log_theta, self.zi_logit = (
            torch.tensor(var[name].to_numpy(), dtype=torch.float32) for name in ("log_theta", "zi_logit")
        )

    def forward(self, latents, cells):
        z, none = latents["z"], torch.zeros_like(self.zi_logit)
        return CellCounts(z, none, latents["library"], self.log_theta, torch.zeros_like(z), self.zi_logit)


def the_truth(seed: int) -> scgen.SCVI:
    adata = scgen.simulate_cells(700, 300, seed=seed)
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata)
    latents = {"z": Known(np.log(adata.layers["true_scale"])), "library": Known(adata.obs[["log_library"]].to_numpy())}
    model.vae = VAE(latents, {"z": StandardNormalPrior(300), "library": LibraryPrior(3)}, Truth(adata.var))
    model.trainings = [{}]  # as if trained
    return model


@pytest.mark.parametrize(("n_samples", "nominal"), [(5, 4 / 6), (25, 24 / 26), (79, 0.95)])
def test_the_truth_is_covered_at_the_nominal_rate(n_samples, nominal):
    check = scgen.posterior_predictive_check(the_truth(n_samples), n_samples=n_samples)
    assert check.nominal == pytest.approx(nominal)
    within = check.summary["within"]
    for statistic, n in {"mean": 300, "variance": 300, "cv": 300, "library": 700}.items():
        assert abs(within[statistic] - nominal) < 4 * (nominal * (1 - nominal) / n) ** 0.5
    assert within["zero_share"] > nominal - 4 * (nominal * (1 - nominal) / 300) ** 0.5  # its ties count as within
    assert (check.summary["correlation"] > 0.85).all()
    assert check.summary["bias"].abs().max() < 0.1


def test_too_little_variance_is_seen():
    adata = scgen.simulate_cells(800, 100, n_batches=2, zero_inflation=0, seed=1)
    scgen.setup_anndata(adata, batch_key="batch")
    summaries = {}
    for likelihood in ("nb", "poisson"):
        model = scgen.SCVI(adata, gene_likelihood=likelihood, use_observed_lib_size=True)
        model.train(60, accelerator="cpu", progress=False)
        summaries[likelihood] = scgen.posterior_predictive_check(model).summary
    fits, fails = summaries["nb"], summaries["poisson"]
    assert fails.loc["variance", "bias"] < -0.25 < -0.1 < fits.loc["variance", "bias"]
    assert fails.loc["zero_share", "bias"] < -0.04 < -0.02 < fits.loc["zero_share", "bias"]
    for statistic in ("variance", "zero_share", "cv"):
        assert fails.loc[statistic, "within"] < 0.3 < 0.6 < fits.loc[statistic, "within"]


@pytest.fixture(scope="module")
def model():
    adata = scgen.simulate_cells(600, 20, n_batches=2, seed=4)
    adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(20) != 7))  # a gene that nobody expresses
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata, n_latent=4, n_hidden=16)
    model.train(10, accelerator="cpu", progress=False)
    return model


def statistics(x: np.ndarray) -> dict[str, np.ndarray]:
    x = x.astype(float)
    with np.errstate(invalid="ignore"):
        cv = x.std(0) / x.mean(0)
    return {"zero_share": (x == 0).mean(0), "mean": x.mean(0), "variance": x.var(0), "cv": cv, "library": x.sum(1)}


def test_numbers_are_those_of_the_replicates_in_memory(model):
    chosen = np.random.default_rng(0).permutation(600)[:550]  # more than a minibatch, in another order
    check = scgen.posterior_predictive_check(model, indices=chosen, n_samples=50, seed=3)
    replicates = model.posterior_predictive_sample(indices=chosen, n_samples=50, seed=3)
    drawn = [statistics(x.toarray()) for x in replicates]
    for name, observed in statistics(model.adata.X.toarray()[chosen]).items():
        table = check.cells if name == "library" else check.genes
        values = np.array([one[name] for one in drawn])
        values = np.where(np.isnan(values).any(0), np.nan, np.sort(values, axis=0))
        expected = {
            "observed": observed,
            "replicated": values.mean(0),
            # Below the k-th smallest of 50, a further one falls with probability k / 51; .025 * 51 = 1.275.
            "lower": 0.725 * values[0] + 0.275 * values[1],
            "upper": 0.725 * values[-1] + 0.275 * values[-2],
        }
        for kind, numbers in expected.items():
            np.testing.assert_allclose(table[f"{name}_{kind}"], numbers, rtol=1e-5 if name == "library" else 1e-9)
        between = table[f"{name}_observed"].between(table[f"{name}_lower"], table[f"{name}_upper"])
        assert table[f"{name}_within"].tolist() == between.tolist()
        known = np.isfinite(expected["replicated"]) & np.isfinite(observed)
        low, high, seen, mean = (expected[kind][known] for kind in ("lower", "upper", "observed", "replicated"))
        row = check.summary.loc[name]
        assert row["within"] == pytest.approx(((seen >= low) & (seen <= high)).mean(), abs=1e-3)
        if name != "zero_share":
            both = (seen > 0) & (mean > 0)
            seen, mean = np.log(seen[both]), np.log(mean[both])
        assert row["bias"] == pytest.approx((mean - seen).mean(), abs=1e-5)
        assert row["absolute_error"] == pytest.approx(np.abs(mean - seen).mean(), rel=1e-4)
        assert row["correlation"] == pytest.approx(np.corrcoef(mean, seen)[0, 1], rel=1e-4)
    assert check.genes.index.tolist() == model.registry.genes
    assert check.cells.index.tolist() == model.adata.obs_names[chosen].tolist()
    assert np.isnan(check.genes["cv_observed"].iloc[7])


def test_other_cells_and_seeds(model):
    other = model.adata[:100, ::-1].copy()  # genes are found by name
    check, same = (scgen.posterior_predictive_check(model, adata=other, n_samples=3) for _ in range(2))
    pd.testing.assert_frame_equal(check.genes, same.genes)
    assert check.genes.index.tolist() == model.registry.genes
    np.testing.assert_allclose(check.genes["mean_observed"], model.adata.X.toarray()[:100].mean(0), rtol=1e-6)
    another = scgen.posterior_predictive_check(model, adata=other, n_samples=3, seed=1)
    assert not np.allclose(another.cells["library_replicated"], check.cells["library_replicated"])


def test_what_it_does_not_take(model, cells):
    with pytest.raises(TypeError, match="AnnData, not a trained model"):
        scgen.posterior_predictive_check(model.adata)
    with pytest.raises(ValueError, match="n_samples=1"):
        scgen.posterior_predictive_check(model, n_samples=1)
    normal = scgen.SCVI(cells, gene_likelihood="normal")
    with pytest.raises(ValueError, match="does not generate counts"):
        scgen.posterior_predictive_check(normal)
    with pytest.raises(RuntimeError, match=r"model\.train"):
        scgen.posterior_predictive_check(scgen.SCVI(cells))
