"""The count distributions against scipy, published values, sums over their support and finite differences."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from scgen.distributions import CellCounts, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

torch.set_default_dtype(torch.float32)


def log(value) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64).log()


def zinb(mu: float, theta: float, pi: float) -> ZeroInflatedNegativeBinomial:
    return ZeroInflatedNegativeBinomial(log([mu]), log([theta]), log([pi / (1 - pi)]))


@pytest.mark.parametrize("mu", [0.01, 4, 50, 1000])
@pytest.mark.parametrize("theta", [0.1, 0.5, 2, 1000])
def test_negative_binomial_is_scipys(mu, theta):
    x = np.arange(200.0)
    ours = NegativeBinomial(log([mu]), log([theta])).log_prob(torch.from_numpy(x)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(ours, stats.nbinom.logpmf(x, theta, theta / (theta + mu)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mu", [0.01, 4, 5e5])
def test_poisson_is_scipys(mu):
    x = np.array([0.0, 1, 2, 17, 400, 1e6])
    ours = Poisson(log([mu])).log_prob(torch.from_numpy(x)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(ours, stats.poisson.logpmf(x, mu), rtol=1e-9)


def test_values_are_those_of_mpmath():
    x = torch.tensor([0.0, 1, 3, 10], dtype=torch.float64)[:, None]
    zero_inflated = [-0.3101549283038396, -3.1135153092103742, -3.231298344866757, -5.057953189945429]
    np.testing.assert_allclose(zinb(4, 2, 0.7).log_prob(x)[:, 0], zero_inflated, rtol=1e-9)
    plain = [-2.197224577336219, -1.909542504884438, -2.0273255405408213, -3.8539803856194927]
    np.testing.assert_allclose(NegativeBinomial(log([4.0]), log([2.0])).log_prob(x)[:, 0], plain, rtol=1e-9)
    rare = [-0.0009990013313365, -6.910752282976146, -19.813968114391614]
    np.testing.assert_allclose(NegativeBinomial(log([1e-3]), log([0.5])).log_prob(x[:3])[:, 0], rare, rtol=1e-9)


@pytest.mark.parametrize(
    ("mu", "theta", "pi", "mean", "variance"),
    [(4, 2, 0.7, 1.2, 6.96), (10, 0.5, 0.1, 9, 198), (0.3, 5, 0.5, 0.15, 0.1815)],
)
def test_zinb_sums_to_one_with_its_moments(mu, theta, pi, mean, variance):
    x = torch.arange(20_001, dtype=torch.float64)[:, None]
    p = zinb(mu, theta, pi).log_prob(x).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-8)
    assert (p * x).sum().item() == pytest.approx(mean, rel=1e-8)
    assert (p * (x - mean) ** 2).sum().item() == pytest.approx(variance, rel=1e-7)
    assert zinb(mu, theta, pi).mean.item() == pytest.approx(mean, rel=1e-9)
    assert zinb(mu, theta, pi).variance.item() == pytest.approx(variance, rel=1e-9)


def test_gradients_are_finite_differences():
    x = torch.tensor([0.0, 1, 5, 1e5, 0, 3], dtype=torch.float64)
    log_mu = torch.tensor([0.3, -2, 1, 11, np.log(1e-12), 2], dtype=torch.float64, requires_grad=True)
    log_theta = torch.tensor([0.5, 1, np.log(1e4), 0, 0.2, -3], dtype=torch.float64, requires_grad=True)
    logits = torch.tensor([0.0, 2, -2, 30, -30, 1], dtype=torch.float64, requires_grad=True)
    # A wide step: at x = 1e5 the value's own rounding would drown a narrow one.
    for distribution, parameters in (
        (ZeroInflatedNegativeBinomial, (log_mu, log_theta, logits)),
        (NegativeBinomial, (log_mu, log_theta)),
        (Poisson, (log_mu,)),
    ):
        assert torch.autograd.gradcheck(
            lambda *p, kind=distribution: kind(*p).log_prob(x), parameters, eps=1e-4, rtol=1e-4, atol=1e-4
        )


def test_nothing_overflows():  # in float32, at the bounds that the decoder keeps
    corners = torch.cartesian_prod(
        torch.tensor([0.0, 1, 1e5, 1e6]),
        torch.tensor([-1e4, -30, 0, 18.4]),
        torch.tensor([-18.4, 0, 18.4]),
        torch.tensor([-1e4, -30, 0, 30, 1e4]),
    )
    x, *parameters = (column[:, None].clone() for column in corners.T)
    parameters = [p.requires_grad_() for p in parameters]
    for value in (
        ZeroInflatedNegativeBinomial(*parameters).log_prob(x),
        NegativeBinomial(*parameters[:2]).log_prob(x),
        Poisson(parameters[0]).log_prob(x),
    ):
        assert value.isfinite().all()
        used = torch.autograd.grad(value.sum(), parameters, allow_unused=True)
        assert all(gradient.isfinite().all() for gradient in used if gradient is not None)


def exact(x, log_mu, log_theta, logits=None):
    """The same in float64 by scipy alone: the definition, term by term."""
    theta = np.exp(log_theta)
    rising = special.gammaln(x + theta) - special.gammaln(theta) - x * log_theta
    nb = rising - special.gammaln(x + 1) + x * log_mu - (x + theta) * np.logaddexp(0, log_mu - log_theta)
    if logits is None:
        return nb
    log_pi, log_not_pi = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
    return np.where(x == 0, np.logaddexp(log_pi, log_not_pi + nb), log_not_pi + nb)


def test_float32_keeps_its_digits():  # to 1e-5 max(1, |value|)
    rng = np.random.default_rng(0)
    n = 20_000
    x = np.concatenate([np.zeros(n // 4), rng.integers(1, 50, n // 4), 10 ** rng.uniform(2, 6, n // 2)]).round()
    log_mu = np.where(rng.random(n) < 0.5, np.log(np.maximum(x, 1e-3)) + rng.normal(0, 0.3, n), rng.uniform(-20, 14, n))
    log_theta, logits = rng.uniform(-5, np.log(1e8), n), rng.normal(0, 5, n)
    x, log_mu, log_theta, logits = (a.astype(np.float32) for a in (x, log_mu, log_theta, logits))
    wide = [a.astype(np.float64) for a in (x, log_mu, log_theta, logits)]
    tensors = [torch.from_numpy(a) for a in (log_mu, log_theta, logits)]
    for ours, truth in (
        (NegativeBinomial(*tensors[:2]), exact(*wide[:3])),
        (ZeroInflatedNegativeBinomial(*tensors), exact(*wide)),
    ):
        error = np.abs(ours.log_prob(torch.from_numpy(x)).numpy() - truth) / np.maximum(1, np.abs(truth))
        assert error.max() < 1e-5


def test_large_theta_is_poisson():
    # scvi-tools' form gives -2.278 here in float32; the Poisson limit is -1.693.
    value = NegativeBinomial(torch.zeros(1), torch.tensor([np.log(1e6)], dtype=torch.float32)).log_prob(
        torch.tensor([2.0])
    )
    assert value.item() == pytest.approx(stats.poisson.logpmf(2, 1), abs=1e-5)


@pytest.mark.parametrize("case", [(4, 2, 0.7), (10, 0.5, 0.1), (0.3, 5, 0.5)])
def test_samples_have_the_moments(case):
    torch.manual_seed(0)
    n = 200_000
    mu, theta, _ = case
    for p in (zinb(*case), NegativeBinomial(log([mu]), log([theta])), Poisson(log([mu]))):
        x = p.sample((n,))[:, 0].double()
        mean, variance = p.mean.item(), p.variance.item()
        assert abs(x.mean() - mean) < 4 * (variance / n) ** 0.5
        fourth = ((x - mean) ** 4).mean().item()
        assert abs(x.var() - variance) < 4 * ((fourth - variance**2) / n) ** 0.5
        assert ((x >= 0) & (x == x.round())).all()
    assert zinb(*case).sample((n,)).eq(0).double().mean() == pytest.approx(
        zinb(*case).log_prob(torch.zeros(1)).exp().item(), abs=0.005
    )


@pytest.mark.parametrize("theta", [0.02, 0.005, 0.5])
def test_rates_that_underflow_are_zero(theta):
    """Exact draws are exp(log Gamma(theta + 1) + log U / theta); float32 holds none below its smallest number."""
    torch.manual_seed(0)
    rng, n = np.random.default_rng(0), 200_000
    log_mu = torch.tensor([-9.0, 3.0])
    found = NegativeBinomial(log_mu, torch.tensor(np.log(theta), dtype=torch.float32)).sample_rate((n,)).numpy()
    log_gamma = np.log(rng.gamma(theta + 1, 1, n)) + np.log(rng.random(n)) / theta
    smallest = np.log(np.finfo(np.float32).tiny)
    share = (log_gamma < smallest).mean()
    assert share == pytest.approx(special.gammainc(theta, np.exp(smallest)), abs=0.005)
    np.testing.assert_allclose((found == 0).mean(0), share, atol=0.005)
    for rates, mu in zip(found.T, np.exp(log_mu.numpy()), strict=True):
        above = log_gamma[log_gamma > smallest] + np.log(mu / theta)
        assert stats.ks_2samp(np.log(rates[rates > 0]), above).pvalue > 1e-3


@pytest.mark.parametrize("theta_shape", [(7,), (5, 7), (3, 5, 7)])
def test_shapes_broadcast(theta_shape):  # an axis of draws is a loop over it
    rng = np.random.default_rng(1)
    counts = torch.from_numpy(rng.poisson(1.0, (5, 7)).astype(float))
    log_mu, logits = (torch.from_numpy(rng.normal(size=(3, 5, 7))) for _ in range(2))
    log_theta = torch.from_numpy(rng.normal(size=theta_shape))
    together = ZeroInflatedNegativeBinomial(log_mu, log_theta, logits).log_prob(counts)
    alone = [
        exact(counts.numpy(), log_mu[s].numpy(), np.broadcast_to(log_theta.numpy(), (3, 5, 7))[s], logits[s].numpy())
        for s in range(3)
    ]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-9)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("n_parameters", [3, 4, 6])
def test_a_cell_is_its_genes(n_parameters, normalised):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 4, 3), (3,), (5, 4, 1), (3,), (5, 4, 3), (3,)][:n_parameters]
    parameters = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    cells = CellCounts(*parameters, normalised=normalised)
    counts = torch.poisson(torch.full((4, 3), 2.0, dtype=torch.float64), generator=generator)
    assert cells.batch_shape == (5, 4)
    assert cells.event_shape == (3,)
    torch.testing.assert_close(cells.log_prob(counts), cells.base_dist.log_prob(counts).sum(-1))
    rho = torch.exp(parameters[0] + parameters[1])
    rho = rho / rho.sum(-1, keepdim=True) if normalised else rho
    torch.testing.assert_close(cells.base_dist.mu, parameters[2].exp() * rho)
    assert torch.equal(cells.mean, cells.base_dist.mean)
    assert torch.equal(cells.variance, cells.base_dist.variance)
    assert cells.sample((2,)).shape == (2, 5, 4, 3)
