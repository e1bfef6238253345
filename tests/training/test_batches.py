"""The penalty on batch differences of z: autograd of its formula with scipy's densities, and simulated cells."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

import scgen
from scgen.distributions import DiagonalNormal, GaussianMixture
from scgen.training import batches
from scgen.training.batches import BatchPenalty, rise

N, K, S, D = 60, 3, 4, 2


def mixture(seed: int = 0) -> GaussianMixture:
    noise = torch.Generator().manual_seed(seed)
    means, variances = torch.randn(K, D, generator=noise), torch.rand(K, D, generator=noise) + 0.3
    return GaussianMixture(torch.randn(K, generator=noise), DiagonalNormal(means, variances))


@pytest.mark.parametrize("shrinkage", [0.0, 30.0])
def test_gradient_is_that_of_the_formula(monkeypatch, shrinkage):
    monkeypatch.setattr(batches, "SHRINKAGE", shrinkage)
    p, rng = mixture(), np.random.default_rng(0)
    z = torch.tensor(rng.normal(size=(N, D)), dtype=torch.float32, requires_grad=True)
    batch = torch.from_numpy(rng.integers(0, S, N))
    BatchPenalty(S, 1)(DiagonalNormal(z, torch.ones_like(z)), p, batch).backward()

    at, parts = z.detach().clone().double().requires_grad_(True), p.component_distribution
    weights = p.mixture_distribution.probs.numpy()
    joint = np.stack(
        [
            weights[k] * multivariate_normal(parts.mean[k].numpy(), parts.variance[k].numpy()).pdf(at.detach().numpy())
            for k in range(K)
        ],
        axis=1,
    )
    r = torch.from_numpy(joint / joint.sum(1, keepdims=True))
    total, shrunk = 0.0, torch.zeros(N, D, dtype=torch.float64)
    for k in range(K):
        mean = (r[:, k, None] * at).sum(0) / r[:, k].sum()
        for s in range(S):
            own = r[:, k] * (batch == s)
            difference = (own[:, None] * at).sum(0) / own.sum() - mean
            total = total + own.sum() * (difference**2 / parts.variance[k]).sum()
            share = own.sum() / (own.sum() + shrinkage)
            shrunk += (own[:, None] * share * difference / parts.variance[k] / N).detach()
    np.testing.assert_allclose(z.grad, shrunk, rtol=1e-4, atol=1e-7)
    if not shrinkage:
        (total / (2 * N)).backward()
        np.testing.assert_allclose(z.grad, at.grad, rtol=1e-4, atol=1e-7)


def test_shares_of_components_are_free():
    # Two components far apart. Batch 0 is mostly of one, batch 1 of the other; within each, both have the same cells.
    within = torch.tensor([[-0.5, 0.0], [0.5, 0.0], [0.0, 0.3], [0.0, -0.3]])
    z = torch.cat([within] * 9 + [within + 20] + [within] + [within + 20] * 9)
    batch = torch.arange(2).repeat_interleave(40)
    parts = DiagonalNormal(torch.tensor([[0.0, 0.0], [20.0, 20.0]]), torch.ones(2, 2))
    p = GaussianMixture(torch.zeros(2), parts)
    z.requires_grad_(True)
    BatchPenalty(2, 1)(DiagonalNormal(z, torch.ones_like(z)), p, batch).backward()
    assert z.grad.abs().max() < 1e-6
    moved = (z.detach() + batch[:, None]).requires_grad_(True)
    BatchPenalty(2, 1)(DiagonalNormal(moved, torch.ones_like(z)), p, batch).backward()
    assert (moved.grad[batch == 1] > 0).all()
    assert (moved.grad[batch == 0] < 0).all()


def test_means_are_over_an_epoch_of_minibatches():
    p, rng = mixture(), np.random.default_rng(1)
    z, batch = torch.tensor(rng.normal(size=(N, D)), dtype=torch.float32), torch.from_numpy(rng.integers(0, S, N))
    often, once = BatchPenalty(S, 4), BatchPenalty(S, 1)
    for _ in range(100):
        often(DiagonalNormal(z, torch.ones_like(z)), p, batch)
    once(DiagonalNormal(z, torch.ones_like(z)), p, batch)
    # A minibatch that comes again and again counts as often as there are minibatches in an epoch.
    torch.testing.assert_close(often.cells, 4 * once.cells)
    torch.testing.assert_close(often.sums, 4 * once.sums)


def test_it_is_for_mixtures_of_several_components():
    q, one = DiagonalNormal(torch.zeros(5, D), torch.ones(5, D)), DiagonalNormal(torch.zeros(1, D), torch.ones(1, D))
    assert BatchPenalty.applies(q, mixture())
    assert not BatchPenalty.applies(q, GaussianMixture(torch.zeros(1), one))
    assert not BatchPenalty.applies(q, DiagonalNormal(torch.zeros(D), torch.ones(D)))


def test_rises_while_components_form():
    assert [rise(progress) for progress in (0.0, 0.1, 0.2, 1.0)] == [0.0, 0.0, 1.0, 1.0]
    assert rise(0.15) == pytest.approx(0.5)


def apart(z: np.ndarray, types: np.ndarray, batch: np.ndarray) -> float:
    """Return the share of the variance within types that batches explain."""
    total = between = 0.0
    for kind in np.unique(types):
        own, codes = z[types == kind], batch[types == kind]
        own = own - own.mean(0)
        total += (own**2).sum()
        between += sum(len(some) * (some.mean(0) ** 2).sum() for s in np.unique(codes) if len(some := own[codes == s]))
    return between / total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_batches_of_a_type_come_together(seed):
    adata = scgen.simulate_cells(n_cells=600, n_genes=100, n_batches=3, n_types=4, batch_effect=1.0, seed=seed)
    scgen.setup_anndata(adata, batch_key="batch")
    types, batch = adata.obs["cell_type"].to_numpy(), adata.obs["batch"].to_numpy()
    found = {}
    for weight in (0.0, 20.0):
        model = scgen.SCVI(adata, n_latent=5, n_hidden=32, seed=seed)
        model.train(30, batch_penalty=weight, accelerator="cpu", progress=False, seed=seed)
        found[weight] = apart(model.get_latent_representation(), types, batch)
    assert found[20.0] < 0.7 * found[0.0]


def test_a_normal_prior_is_trained_without_it(cells):
    found = []
    for weight in (0.0, 20.0):
        model = scgen.SCVI(cells, n_latent=4, n_hidden=16, prior="normal")
        model.train(3, batch_penalty=weight, accelerator="cpu", progress=False)
        found.append(model.get_latent_representation())
    np.testing.assert_array_equal(*found)
