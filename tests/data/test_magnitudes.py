"""Numbers that float32 cannot be computed with are refused with the cell's name; all others give finite answers."""

import re

import numpy as np
import pytest
import torch

import scgen
from scgen.data.checks import Setup
from scgen.data.registry import Registry, standard

LAST = "cell_100"


@pytest.fixture(scope="module")
def template():
    adata = scgen.simulate_cells(n_cells=100, n_genes=30, n_batches=2, seed=0)
    adata.X = adata.X.astype(np.float64)
    rng = np.random.default_rng(0)
    adata.obs["age"] = rng.normal(50, 10, 100)
    adata.obs["size_factor"] = rng.uniform(0.5, 2, 100)
    return adata


def trained(adata, epochs=2, **arguments):
    model = scgen.SCVI(adata, n_hidden=16, **arguments)
    model.train(max_epochs=epochs, accelerator="cpu", progress=False)
    return model


@pytest.fixture(scope="module")
def aged(template):
    adata = template.copy()
    scgen.setup_anndata(adata, batch_key="batch", continuous_covariate_keys=["age"])
    return trained(adata)


@pytest.mark.parametrize("value", [1e300, -1e300, 1e39, 1.7e308])
def test_a_covariate_beyond_float32_is_refused(template, aged, value):
    adata = template.copy()
    adata.obs.loc[LAST, "age"] = value
    words = rf'adata\.obs\["age"\] has 1 value that is too small or too large \({LAST}\)'
    for ask in (
        lambda: scgen.setup_anndata(adata, continuous_covariate_keys=["age"]),
        lambda: aged.get_latent_representation(adata),
        lambda: aged.query(adata),
    ):
        with pytest.raises(ValueError, match=words):
            ask()


def test_a_covariate_far_from_those_of_training_is_refused(template, aged):
    adata = template.copy()
    adata.obs.loc[LAST, "age"] = 1e20
    with pytest.raises(ValueError, match=rf'adata\.obs\["age"\] has 1 value more than 1e\+15 standard .*{LAST}'):
        aged.get_latent_representation(adata)
    with pytest.raises(ValueError, match=r"more than 1e\+15 standard deviations from the mean"):
        aged.get_normalized_expression(covariates={"age": 1e30})
    adata.obs.loc[LAST, "age"] = 1e15
    for values in (aged.get_latent_representation(adata), aged.get_elbo(adata, return_mean=False)):
        assert np.isfinite(values).all()


@pytest.mark.parametrize("scale", [1e-100, 1e-12, 1.0, 1e15, 1e37])
def test_a_covariate_in_any_unit(template, scale):
    """Nanomoles in moles are as good as in nanomoles."""
    values = template.obs["age"].to_numpy()
    mean, sd = standard(values * scale)
    np.testing.assert_allclose((values * scale - mean) / sd, (values - values.mean()) / values.std(), rtol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e-300, -3e20])
def test_a_constant_is_not_blown_up(constant):
    assert standard(np.full(1001, constant))[1] == 1.0


@pytest.mark.parametrize("value", [1e-320, 1e-45, 1e-16, 1e16, 1e39, 1e300])
def test_a_size_factor_beyond_float32_is_refused(template, value):
    adata = template.copy()
    adata.obs.loc[LAST, "size_factor"] = value
    with pytest.raises(
        ValueError,
        match=re.escape(f"too small or too large ({LAST}). {LAST} has {value:g}; absolute values"),
    ):
        scgen.setup_anndata(adata, size_factor_key="size_factor")


@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_size_factors_of_any_unit_within(template, scale):
    adata = template.copy()
    adata.obs["size_factor"] *= scale
    scgen.setup_anndata(adata, size_factor_key="size_factor")
    assert np.isfinite(trained(adata).get_elbo(return_mean=False)).all()


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("value", [1e16, 1e39, 1e300])
@pytest.mark.parametrize("dense", [True, False])
def test_values_beyond_float32_are_refused(template, value, dense, counts):
    adata = template.copy()
    if dense:
        adata.X = adata.X.toarray()
    for sign in (1,) if counts else (1, -1):
        adata.X[99, 4] = sign * value
        with pytest.raises(
            ValueError, match=rf'adata\.X has 1 value larger than 1e\+15 \(first at cell "{LAST}"\)'
        ) as refused:
            scgen.setup_anndata(adata, counts=counts)
        assert "NaN" not in str(refused.value)
        assert "cannot compute with such large values" in str(refused.value)


@pytest.mark.parametrize("dtype", [np.uint64, np.int64, np.longdouble])
def test_large_integers_of_any_dtype_are_refused(template, dtype):
    adata = template.copy()
    adata.X = adata.X.toarray().astype(dtype)
    adata.X[99, 4] = 2**60
    with pytest.raises(ValueError, match=r"1 value larger than 1e\+15"):
        scgen.setup_anndata(adata)


@pytest.mark.parametrize("arguments", [{}, {"library_residual": False}, {"gene_likelihood": "normal"}])
def test_large_values_within_give_finite_answers(template, arguments):
    adata = template.copy()
    adata.X[99, 4] = 1e14
    scgen.setup_anndata(adata, batch_key="batch", counts="gene_likelihood" not in arguments)
    model = trained(adata, **arguments)
    answers = [model.get_latent_representation(), model.get_elbo(return_mean=False)]
    if "gene_likelihood" not in arguments:
        answers.append(model.get_latent_library_size())
    assert all(np.isfinite(values).all() for values in answers)


def test_a_library_found_by_the_network_is_finite(template):
    """One cell of 9e6 counts; after training that hardly began, and asked about cells that were not there."""
    adata = template.copy()
    adata.X[99, 4] = 9e6
    other = template.copy()
    other.X = np.full(other.shape, 9e6)
    scgen.setup_anndata(adata, batch_key="batch")
    for epochs in (1, 5):
        model = trained(adata, epochs, library_residual=False)
        for cells in (adata, other):
            for give_mean in (True, False):
                library = model.get_latent_library_size(cells, give_mean=give_mean)
                assert np.isfinite(library).all()
                assert (library > 0).all()


def test_training_leads_a_library_back_from_its_bounds(template):
    """All cells start beyond both bounds; the KL to a prior leads them to it, where a gradient of zero would not."""
    adata = template.copy()
    scgen.setup_anndata(adata, batch_key="batch")
    model = trained(adata, library_residual=False)
    (cells,) = model._loader(None, None, 100)
    posterior = model.vae.posteriors["library"]
    with torch.no_grad():
        posterior.mean.bias.fill_(90.0)
        posterior.log_variance.bias.fill_(9.0)
    prior = torch.distributions.Normal(7.0, 0.5)
    optimiser = torch.optim.Adam(posterior.parameters(), lr=0.1)
    for _ in range(600):
        q = posterior(cells)
        loss = torch.distributions.kl_divergence(torch.distributions.Normal(q.mean, q.variance.sqrt()), prior).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    q = posterior(cells)
    np.testing.assert_allclose(q.mean.detach().numpy(), 7, atol=5)
    np.testing.assert_allclose(q.variance.detach().numpy(), 0.25, atol=2)


def test_what_is_missing_is_not_called_far(aged, template):
    registry = Registry(Setup(continuous_covariate_keys=("age",)), ["g"], {}, {"age": (50.0, 10.0)})
    obs = template.obs.assign(age=np.nan)
    assert np.isnan(registry._standardised(obs, "age")).all()
