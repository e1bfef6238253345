"""Models with flows and learned priors: against quadrature, saved, queried, asked; clusters; the weighted bound."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import stats
from scipy.special import logsumexp
from sklearn.metrics import adjusted_rand_score
from torch import nn

import scgen
from scgen.distributions import CellCounts
from scgen.models import files, loaders
from scgen.models.scvi import POSTERIORS, PRIORS

#: Each posterior and each prior, and all of them with one that is not the default.
PAIRS = [pair for pair in itertools.product(POSTERIORS, PRIORS) if "normal" in pair or pair in {("iaf", "vamp")}]


def model_with_posterior(adata: AnnData, posterior: str, prior: str, **others) -> scgen.SCVI:
    model = scgen.SCVI(adata, n_latent=4, n_hidden=16, posterior=posterior, prior=prior, **others)
    model.train(max_epochs=3, accelerator="cpu", progress=False)
    return model


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def asked(request, cells):
    return model_with_posterior(cells, *request.param)


def test_saved_and_loaded_it_answers_alike(asked, cells, tmp_path):
    asked.save(tmp_path / "model")
    again = scgen.SCVI.load(tmp_path / "model", cells)
    for question in ("get_latent_representation", "get_elbo", "get_normalized_expression"):
        assert np.array_equal(getattr(again, question)(), getattr(asked, question)())
    assert np.array_equal(again.sample_prior(20).X.toarray(), asked.sample_prior(20).X.toarray())


def test_training_goes_on(asked, cells, tmp_path):
    asked.save(tmp_path / "model")
    again = scgen.SCVI.load(tmp_path / "model", cells)
    again.train(max_epochs=1, accelerator="cpu", progress=False)
    assert len(again.history) == 4
    assert np.isfinite(again.get_elbo())


def test_embedding_is_the_mean_of_draws(asked):
    mean, variance = asked.get_latent_representation(return_dist=True)
    draws = np.array([asked.get_latent_representation(give_mean=False, seed=seed) for seed in range(400)])
    error = np.sqrt(variance / 400) + draws.std(0) / 10  # of ours, over a hundred draws
    assert (np.abs(draws.mean(0) - mean) < 5 * error).mean() > 0.99
    assert np.median(np.abs(np.log(draws.var(0) / variance))) < 0.3
    # The same for any cells beside, and draws, too.
    draw = asked.get_latent_representation(give_mean=False, seed=3)
    again = asked.get_latent_representation(give_mean=False, seed=3, batch_size=11)
    np.testing.assert_allclose(again, draw, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(asked.get_latent_representation(indices=[7, 3]), mean[[7, 3]], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(asked.get_latent_representation(batch_size=11), mean, rtol=1e-4, atol=1e-5)


def test_the_marginal_likelihood_is_above_the_bound(asked):
    bounds = [asked.get_elbo(seed=seed) for seed in range(20)]
    assert asked.get_marginal_ll(n_mc_samples=200) > np.mean(bounds) - 2 * np.std(bounds)


def test_new_cells_are_mapped(asked, cells):
    shuffled = np.random.default_rng(0).permutation(cells.n_vars)
    found = asked.query(cells[:40, shuffled].copy())
    again = asked.query(cells[:40].copy())
    assert np.array_equal(found.get_latent_representation(), again.get_latent_representation())
    # Of genes in another order, some of which are not there, the prior is the same.
    fewer = asked.query(cells[:40, shuffled[5:]].copy())
    z = torch.randn(7, 1, 4)
    with torch.no_grad():
        log_p = [query.model.vae.eval().prior("z", None).log_prob(z) for query in (found, fewer)]
        for one in log_p:
            torch.testing.assert_close(one, asked.vae.eval().prior("z", None).log_prob(z))
    # What encoders read of the missing ones is what the decoder expects of them: of the reference, the same cells.
    loader = loaders.of_question(fewer.model, None, None, 40)
    (imputed,) = (fewer.model.vae.impute(one).imputed_counts.numpy() for one in loader)
    order = fewer.model.registry.genes + fewer.model.registry.missing
    filled = AnnData(imputed[:, pd.Index(order).get_indexer(cells.var_names)], cells.obs[:40], cells.var)
    with torch.no_grad():
        (same,) = loaders.of_question(asked, cells[:40], None, 40)
        same = dataclasses.replace(same, imputed_counts=torch.from_numpy(filled.X))
        expected = asked.vae.posteriors["z"].means(same).numpy()
    np.testing.assert_allclose(fewer.get_latent_representation(), expected, rtol=1e-3, atol=1e-4)


def test_only_a_new_batch_is_learned(asked, cells):
    other = cells[:60].copy()
    other.obs["batch"] = "of another day"
    query = asked.query(other)
    before = {name: weight.clone() for name, weight in query.model.vae.state_dict().items()}
    query.train(max_epochs=2, progress=False)
    for name, weight in query.model.vae.state_dict().items():
        if ".rows." in name:
            assert torch.equal(weight[:2], before[name][:2])
            assert not torch.equal(weight[2], before[name][2])
        else:
            assert torch.equal(weight, before[name]), name
    assert query.typicality()["typicality"].between(0, 1).all()


@pytest.mark.parametrize(("posterior", "prior"), [("iaf", "flow"), ("planar", "vamp"), ("planar", "mog")])
@pytest.mark.parametrize("likelihood", ["nb", "poisson", "normal"])
def test_other_likelihoods(cells, likelihood, posterior, prior):
    model = model_with_posterior(cells, posterior, prior, gene_likelihood=likelihood)
    assert np.isfinite([model.get_elbo(), model.get_marginal_ll(n_mc_samples=20)]).all()
    assert np.isfinite(model.sample_prior(10).X.toarray()).all()


def test_pseudo_inputs_start_at_cells(cells):
    model = scgen.SCVI(cells, n_latent=4, n_hidden=16, prior="vamp", n_components=6)
    model.train(max_epochs=1, learning_rate=1e-9, accelerator="cpu", progress=False)
    started = model.vae.priors["z"].pseudo_inputs.exp().detach().numpy() - 0.01
    counts = cells.X.toarray()[model.train_indices]
    distance = np.abs(started[:, None] - counts).max(-1)
    assert distance.min(1).max() < 1e-3
    # They are spread over the data, from the first cell to the last.
    np.testing.assert_allclose(distance.argmin(1), np.linspace(0, len(counts) - 1, 6), atol=1)


@pytest.mark.parametrize("prior", ["mog", "vamp"])
def test_cluster_probabilities_are_bayes_rule(cells, prior):
    model = model_with_posterior(cells, "normal", prior, n_components=5)
    probs = model.get_cluster_probs(indices=[5, 2, 9], n_samples=400)
    assert (probs.shape, probs.index.tolist()) == ((3, 5), cells.obs_names[[5, 2, 9]].tolist())
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    mean, variance = model.get_latent_representation(indices=[5, 2, 9], return_dist=True)
    with torch.no_grad():
        p = model.vae.eval().prior("z", None)
    components = p.component_distribution
    m, v = (part.detach().numpy()[:, None, None] for part in (components.mean, components.variance))
    noise = np.random.default_rng(0).standard_normal((4000, 3, 4))
    log_joint = stats.norm(m, v**0.5).logpdf(mean + variance**0.5 * noise).sum(-1)
    log_joint += np.log(p.mixture_distribution.probs.numpy())[:, None, None]
    by_hand = np.exp(log_joint - logsumexp(log_joint, axis=0)).mean(1).T
    np.testing.assert_allclose(probs, by_hand, atol=0.05)


def test_clusters_are_found():
    adata = scgen.simulate_cells(n_cells=600, n_genes=100, n_batches=2, n_types=3, type_effect=1.0, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata, n_latent=4, prior="mog", n_components=8)
    model.train(progress=False, accelerator="cpu", kl_start=4.0)
    clusters = model.get_cluster_probs().idxmax(axis=1)
    assert adjusted_rand_score(adata.obs["cell_type"], clusters) > 0.8


@pytest.mark.parametrize("prior", ["normal", "flow"])
def test_clusters_of_a_prior_without_components(cells, prior):
    with pytest.raises(ValueError, match=rf'prior="{prior}" has no components.*prior="mog"'):
        scgen.SCVI(cells, prior=prior).get_cluster_probs()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"posterior": "radial"}, 'posterior=\'radial\' is unknown; choose "normal", "planar" or "iaf"'),
        ({"prior": "gmm"}, 'prior=\'gmm\' is unknown; choose "normal", "mog", "vamp" or "flow"'),
        ({"n_flows": 4}, "n_flows=4 is for posterior=planar or iaf, not for posterior='normal'"),
        ({"posterior": "iaf", "n_flows": 101}, "n_flows=101; it takes a whole number from 1 to 100"),
        ({"prior": "mog", "n_components": 10**30}, "from 1 to 100000"),
        ({"posterior": "iaf", "n_flows": 0}, "n_flows=0"),
        ({"prior": "flow", "n_components": 3}, "n_components=3 is for prior=mog or vamp, not for prior='flow'"),
        ({"prior": "mog", "n_components": 2.5}, "n_components=2.5"),
    ],
)
def test_wrong_choices(cells, arguments, message):
    with pytest.raises(ValueError, match=message):
        scgen.SCVI(cells, **arguments)


@pytest.mark.parametrize("samples", [0, 1.5, "5"])
def test_wrong_numbers_of_importance_samples(cells, samples):
    with pytest.raises((TypeError, ValueError), match="n_importance_samples"):
        scgen.SCVI(cells).train(1, n_importance_samples=samples)


def test_training_by_the_weighted_bound(cells):
    model = scgen.SCVI(cells, n_latent=4, n_hidden=16)
    model.train(max_epochs=20, n_importance_samples=8, accelerator="cpu", progress=False)
    assert model.trainings[0]["n_importance_samples"] == 8
    plain = scgen.SCVI(cells, n_latent=4, n_hidden=16)
    plain.train(max_epochs=20, accelerator="cpu", progress=False)
    assert not np.allclose(plain.get_latent_representation(), model.get_latent_representation())
    # Its parts are means over the draws.
    error = np.mean([model.get_reconstruction_error(indices=model.validation_indices, seed=i) for i in range(20)])
    assert model.history["log_likelihood_validation"][20] == pytest.approx(-error, rel=0.05)
    # What is in the history is the bound of eight draws, and of the best epoch the weights are.
    rows = model.validation_indices
    bound = model.get_marginal_ll(indices=rows, n_mc_samples=8, seed=0)
    assert model.history["elbo_validation"][11:].max() == pytest.approx(bound, rel=1e-4)
    assert bound > np.mean([model.get_elbo(indices=rows, seed=seed) for seed in range(50)]) + 1


class Curved(nn.Module):
    """Poisson counts whose rates follow a curve in z, so that a cell's z is correlated, and skewed."""

    n_missing, n_genes = 0, 12

    def __init__(self):
        super().__init__()
        weights = np.random.default_rng(0).normal(size=(self.n_genes, 2))
        self.register_buffer("weights", torch.from_numpy(weights.astype(np.float32)))

    def start_at(self, mean, variance):
        pass

    def logits(self, z):
        return torch.stack([z[..., 0] + z[..., 1], z[..., 1] - 0.5 * z[..., 0] ** 2], -1) @ self.weights.T

    def target(self, cells):
        return cells.counts

    def forward(self, latents, cells):
        return CellCounts(self.logits(latents["z"]), torch.zeros(self.n_genes), latents["library"], None, None, None)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flows_close_the_gap_to_a_posterior_known_by_quadrature(seed):
    truth, rng = Curved(), np.random.default_rng(seed)
    rates = truth.logits(torch.from_numpy(rng.normal(size=(1000, 2)).astype(np.float32))).softmax(-1).numpy()
    adata = AnnData(rng.poisson(30 * rates).astype(np.float32))
    scgen.setup_anndata(adata)
    axis = np.linspace(-6, 6, 241)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    rates = truth.logits(torch.from_numpy(grid.astype(np.float32))).softmax(-1).numpy()
    log_prior = stats.norm.logpdf(grid).sum(1) + 2 * np.log(axis[1] - axis[0])
    log_p = [logsumexp(stats.poisson.logpmf(x, x.sum() * rates).sum(1) + log_prior) for x in adata.X[:200]]
    found = {}
    for posterior in ("normal", "iaf"):
        model = scgen.SCVI(
            adata,
            n_latent=2,
            n_hidden=64,
            dropout_rate=0.0,
            gene_likelihood="poisson",
            use_observed_lib_size=True,
            posterior=posterior,
            seed=seed,
        )
        model.vae.decoder = Curved()
        options = {"learning_rate": 5e-3, "kl_start": 1.0, "precision": "32", "early_stopping": False, "seed": seed}
        model.train(80, accelerator="cpu", progress=False, **options)
        found[posterior] = np.mean([model.get_elbo(indices=range(200), seed=draw) for draw in range(20)])
    gap = np.mean(log_p) - found["normal"]
    assert gap > 0.5  # or there would be nothing to close
    assert found["normal"] + 0.5 * gap < found["iaf"] < np.mean(log_p)


def test_pseudo_inputs_of_categories_that_there_are_not(cells):
    model = scgen.SCVI(cells, n_latent=4, n_hidden=16, prior="vamp", n_components=3)
    for code in (-1, 2):
        weights = {name: weight.clone() for name, weight in model.vae.state_dict().items()}
        weights["priors.z.categories"][1, 0] = code
        with pytest.raises(ValueError, match="codes of categories are out of range"):
            files.assembled(scgen.SCVI, model.registry, model.arguments, weights)
