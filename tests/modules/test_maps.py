"""Latent maps: their posterior against explicit covariances, sizes of outputs, and that missing places are ignored."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal, kl_divergence

from scgen.distributions import DiagonalNormal
from scgen.modules.maps import MapDecoder, MapPosterior, halvings
from scgen.modules.places import Places
from scgen.modules.priors import StandardNormalPrior
from scgen.modules.vae import VAE
from scgen.seeding import seeded

N, SIDE, F, K, D = 30, 5, 4, 3, 3


@pytest.fixture
def patches() -> Places:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.poisson(3.0, (N, SIDE**2, F)).astype(np.float32))
    mask = torch.from_numpy(rng.random((N, SIDE**2)) < 0.7)
    mask[:, SIDE**2 // 2] = True
    codes = torch.arange(N) % 2
    return Places(
        counts=features[:, 0],
        library=torch.zeros(N, 1),
        batch=codes,
        labels=codes,
        categorical=torch.zeros(N, 0, dtype=torch.int64),
        continuous=torch.zeros(N, 0),
        index=torch.arange(N),
        features=features,
        mask=mask,
    )


def posterior(covariance="full", rank=None, n_maps=K, log_input=True) -> MapPosterior:
    with seeded(0):
        return MapPosterior(halvings((SIDE, SIDE), D), F, n_maps, D, covariance, rank, 8, log_input).eval()


def model(likelihood="nb", covariance="full", rank=None) -> VAE:
    with seeded(0):
        decoder = MapDecoder(likelihood, halvings((SIDE, SIDE), D), K, D, F, 8, 2)
        log_input = likelihood != "normal"
        return VAE(
            {"z": posterior(covariance, rank, log_input=log_input)}, {"z": StandardNormalPrior(K * D * D)}, decoder
        )


def giving(q: MapPosterior, outputs: np.ndarray) -> MapPosterior:
    """Let the encoder return the same outputs (K, n) for every patch, in float64."""
    last = q.double().encoder.whole[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.from_numpy(outputs.ravel()))
    return q


def in_float64(cells: Places) -> Places:
    return dataclasses.replace(cells, features=cells.features.double())


def of_outputs(outputs: np.ndarray, covariance: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return what the documentation says that the outputs mean: M (K, D, D), and the covariance of each map."""
    mean, covariances = outputs[:, : D * D].reshape(-1, D, D), []
    for rest in outputs[:, D * D :]:
        if covariance == "independent":
            covariances.append(np.diag(np.exp(rest) + 1e-4))
            continue
        factors = []
        for half in np.split(rest, 2):
            below = np.zeros((D, D))
            if covariance == "full":
                below[1, 0], below[2, 0], below[2, 1] = half[D:]
            factors.append(np.diag(np.sqrt(np.exp(half[:D]) + 1e-4)) @ (np.eye(D) + below))
        covariances.append(np.kron(*(a @ a.T for a in factors)))
    return mean, covariances


@pytest.mark.parametrize("covariance", ["diagonal", "full", "independent"])
def test_divergence_density_and_draws_are_those_of_the_kronecker_covariance(patches, covariance):
    rng = np.random.default_rng(1)
    n_outputs = {"diagonal": 15, "full": 21, "independent": 18}[covariance]
    outputs = 0.7 * rng.standard_normal((K, n_outputs))
    mean, covariances = of_outputs(outputs, covariance)
    whole = MultivariateNormal(torch.from_numpy(mean.ravel()), torch.block_diag(*map(torch.from_numpy, covariances)))
    q = giving(posterior(covariance), outputs)(in_float64(patches))
    prior = DiagonalNormal(torch.zeros(27).double(), torch.ones(27).double())
    standard = MultivariateNormal(torch.zeros(27).double(), torch.eye(27).double())
    np.testing.assert_allclose(kl_divergence(q, prior).detach(), [kl_divergence(whole, standard)] * N, rtol=1e-9)
    with seeded(2), torch.no_grad():
        draws, log_q = q.rsample_and_log_prob((20_000,))
    expected = sum(
        stats.multivariate_normal(m.ravel(), c).logpdf(draws[:5, 0, 9 * k : 9 * k + 9])
        for k, (m, c) in enumerate(zip(mean, covariances, strict=True))
    )
    np.testing.assert_allclose(log_q[:5, 0], expected, rtol=1e-9)
    s, n = whole.covariance_matrix.numpy(), 20_000 * N
    found = np.cov(draws.flatten(0, 1).numpy(), rowvar=False)
    # The variance of a sample covariance of Gaussians is (s_ii s_jj + s_ij^2) / n.
    error = (found - s) / np.sqrt((np.outer(s.diagonal(), s.diagonal()) + s**2) / n)
    assert np.abs(error).max() < 4.5  # of 378 values
    np.testing.assert_allclose(q.mean[0].detach(), mean.ravel(), rtol=1e-12)
    np.testing.assert_allclose(posterior(covariance).double().means(in_float64(patches)).shape, (N, 27))


@pytest.mark.parametrize("covariance", ["diagonal", "full", "independent"])
def test_a_mean_of_full_rank_is_any_mean(patches, covariance):
    rng = np.random.default_rng(0)
    outputs = rng.standard_normal((K, {"diagonal": 15, "full": 21, "independent": 18}[covariance]))
    mean, rest = outputs[:, :9].reshape(K, 3, 3), outputs[:, 9:]
    u, s, v = np.linalg.svd(mean)  # M = sum of s u v^T
    mu, nu = (u * s[:, None]).transpose(0, 2, 1), v
    as_sum = np.concatenate([mu.reshape(K, 9), nu.reshape(K, 9), rest], 1)
    full, low = giving(posterior(covariance), outputs), giving(posterior(covariance, rank=3), as_sum)
    q, p = full(in_float64(patches)), low(in_float64(patches))
    np.testing.assert_allclose(p.mean.detach(), q.mean.detach(), rtol=1e-9)
    np.testing.assert_allclose(p.variance.detach(), q.variance.detach(), rtol=1e-9)
    x = torch.from_numpy(rng.standard_normal(27))
    np.testing.assert_allclose(p.log_prob(x).detach(), q.log_prob(x).detach(), rtol=1e-9)


@pytest.mark.parametrize("rank", [1, 2])
def test_means_have_the_rank_that_was_asked_for(patches, rank):
    q = posterior("diagonal", rank)
    means = q.means(patches).detach().unflatten(-1, (K, D, D))
    assert (np.linalg.matrix_rank(means.double(), tol=1e-6) == rank).all()


@pytest.mark.parametrize(
    ("covariance", "rank", "expected"),
    # of d = 3: (d^2 + 2d) K, 4 d K, 2 d^2 K, d^2 + d (d + 1)
    [("diagonal", None, 960), ("diagonal", 1, 768), ("independent", None, 1152), ("full", None, 1344)],
)
def test_outputs_of_the_encoder_are_as_many_as_in_the_paper(covariance, rank, expected):
    assert posterior(covariance, rank, n_maps=64).encoder.whole[-1].out_features == expected


@pytest.mark.parametrize("covariance", ["diagonal", "full", "independent"])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_every_weight_has_a_gradient_at_the_start(patches, covariance, rank):
    vae = model(covariance=covariance, rank=rank).train()
    with seeded(0):
        vae(patches).loss().backward()
    last = vae.posteriors["z"].encoder.whole[-1]
    assert (last.weight.grad.abs().amax(1) > 0).all()
    assert all(weight.grad.abs().max() > 0 for weight in vae.parameters())


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "normal"])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_missing_places_have_no_influence_on_the_bound_and_its_gradients(patches, likelihood, covariance):
    damaged = dataclasses.replace(patches, features=patches.features.masked_fill(~patches.mask[..., None], 50.0))
    found = []
    for cells in (patches, damaged):
        vae = model(likelihood, covariance).train()
        with seeded(1):
            loss = vae(cells).loss()
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in vae.parameters())])
    for expected, value in zip(*found, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 3), (7, 7), (8, 8), (28, 28), (64, 64), (13, 30)])
@pytest.mark.parametrize("d", [1, 3])
def test_images_of_all_sizes_are_encoded_and_decoded(shape, d):
    sizes = halvings(shape, d)
    n = shape[0] * shape[1]
    cells = Places(
        **dict.fromkeys(("counts", "library", "labels", "categorical", "continuous", "index"), torch.zeros(2, 0)),
        batch=torch.tensor([0, 1]),
        features=torch.randn(2, n, 3, generator=torch.Generator().manual_seed(0)),
        mask=torch.ones(2, n, dtype=torch.bool),
    )
    q = MapPosterior(sizes, 3, 2, d, "diagonal", None, 4, False)(cells)
    decoder = MapDecoder("normal", sizes, 2, d, 3, 4, 2)
    assert decoder({"z": q.rsample((5,))}, cells).mean.shape == (5, 2, n, 3)


def test_a_value_of_a_map_changes_what_is_near_its_place():
    with seeded(0):
        decoder = MapDecoder("normal", [(7, 7), (4, 4)], 1, 4, 1, 16, 1)
    cells = Places(
        **dict.fromkeys(("counts", "library", "labels", "categorical", "continuous", "index"), torch.zeros(1, 0)),
        batch=torch.zeros(1),
        features=torch.zeros(1, 49, 1),
        mask=torch.ones(1, 49, dtype=torch.bool),
    )
    z = torch.zeros(1, 16)
    z[0, 3] = 30.0  # the last column of the first row
    with torch.no_grad():
        change = decoder({"z": z}, cells).mean - decoder({"z": torch.zeros(1, 16)}, cells).mean
    changed = (change != 0).reshape(7, 7)
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[:4, 3:] = True  # within a step of it in the small image, whose places are two apart in the large one
    assert torch.equal(changed, expected)


def test_batches_change_what_is_decoded(patches):
    decoder = model("normal").decoder
    z = torch.randn(N, K * D * D, generator=torch.Generator().manual_seed(0))
    before = decoder({"z": z}, patches).mean.detach()
    with torch.no_grad():
        decoder.batch[1] += 1.0
    changed = (decoder({"z": z}, patches).mean.detach() != before).flatten(1)
    assert changed[patches.batch == 1].all()
    assert not changed[patches.batch == 0].any()
    assert decoder.category_rows() == {"batch": "batch"}
