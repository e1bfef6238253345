"""Learned priors: densities against scikit-learn and by hand; every posterior with every prior keeps its promises."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture
from torch.autograd.functional import jacobian

from scgen.distributions import DiagonalNormal, FlowDistribution
from scgen.models.scvi import POSTERIORS, PRIORS, SCVI
from scgen.modules.elbo import draw_and_kl
from scgen.modules.priors import FlowPrior, MixturePrior, StandardNormalPrior

from .test_parts import DEFAULTS, registry, some_cells

D = 3


def built(posterior: str = "normal", prior: str = "normal", **others):
    arguments = DEFAULTS | {"n_latent": D, "n_hidden": 16, "posterior": posterior, "prior": prior} | others
    torch.manual_seed(0)
    return SCVI.build(registry(20, 2), SCVI.Arguments(**arguments))


def disturbed(vae, spread: float = 0.1):
    """Return the module with all parameters moved, so that none is where it started."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in vae.parameters():
            weight.add_(spread * torch.randn_like(weight))
    return vae


def random_mixture(k: int = 4) -> MixturePrior:
    torch.manual_seed(0)
    prior = MixturePrior(D, k).double()
    with torch.no_grad():
        for weight in prior.parameters():
            weight.normal_()
    return prior


def test_mixture_is_scikit_learns():
    prior = random_mixture()
    theirs = GaussianMixture(4, covariance_type="diag")
    theirs.weights_ = prior.logits.softmax(0).detach().numpy()
    theirs.means_, theirs.covariances_ = prior.means.detach().numpy(), (2 * prior.log_scales).exp().detach().numpy()
    theirs.precisions_cholesky_ = theirs.covariances_**-0.5
    z = torch.randn(5, 50, D).double()
    ours = prior(None, None).log_prob(z).detach()
    np.testing.assert_allclose(ours.flatten(), theirs.score_samples(z.reshape(-1, D).numpy()), rtol=1e-9)


def test_one_standard_component_is_the_normal_prior():
    torch.manual_seed(0)
    one, normal = MixturePrior(D, 1), StandardNormalPrior(D)
    with torch.no_grad():
        one.means.zero_()
        one.log_scales.zero_()
    z = torch.randn(100, D)
    assert torch.equal(one(None, None).log_prob(z), normal(None, None).log_prob(z))
    q = DiagonalNormal(torch.tensor([0.5, -1, 2]), torch.tensor([0.25, 1.5, 0.04]))
    _, draws = draw_and_kl(q, one(None, None), (100_000,))
    _, exact = draw_and_kl(q, normal(None, None), ())
    assert exact.item() == pytest.approx(4.119852538939963, rel=1e-6)  # by mpmath
    assert abs(draws.mean().item() - exact.item()) < 4 * draws.std().item() / len(draws) ** 0.5


def test_a_flow_starts_at_the_normal_prior():
    z = torch.randn(100, D)
    ours = FlowPrior(D)(None, None).log_prob(z)
    np.testing.assert_allclose(ours.detach(), stats.norm.logpdf(z.numpy()).sum(1), rtol=1e-5)


def test_samples_of_priors_agree_with_their_densities():
    for prior in (random_mixture(), disturbed(FlowPrior(D).double(), 0.15)):
        with torch.no_grad():
            p, other = prior(None, None), DiagonalNormal(torch.zeros(D).double(), torch.full((D,), 0.2).double())
            z = p.sample((50_000,))
            ratio = (other.log_prob(z) - p.log_prob(z)).exp()
        assert abs(ratio.mean().item() - 1) < 4 * ratio.std().item() / len(ratio) ** 0.5


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("likelihood", ["nb", "normal"])
def test_pseudo_inputs_are_encoded_as_in_a_question(likelihood, posterior):
    vae = disturbed(built(posterior, "vamp", n_components=5, gene_likelihood=likelihood, dropout_rate=0.5))
    cells = some_cells(40, 20, 2)
    vae.train()
    for _ in range(3):
        vae(cells)  # running statistics that are not the first ones
    prior = vae.priors["z"]
    prior.start_at(some_cells(5, 20, 2, scale=4))
    z = torch.randn(2, 40, D)
    buffers = {name: buffer.clone() for name, buffer in vae.named_buffers()}
    found = vae.prior("z", cells).log_prob(z)
    assert vae.posteriors["z"].training
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in vae.named_buffers())
    # By hand: the posterior's Gaussian of cells with these counts.
    vae.eval()
    start = some_cells(5, 20, 2, scale=4)
    counts = start.counts + (0.01 if likelihood == "nb" else 0)
    base = vae.posteriors["z"] if posterior == "normal" else vae.posteriors["z"].base
    h = base.mlp(torch.log1p(counts) if likelihood == "nb" else counts, start)
    mean, variance = base.mean(h).detach().numpy(), (base.log_variance(h).exp() + 1e-4).detach().numpy()
    each = stats.norm(mean, variance**0.5).logpdf(z.numpy()[:, :, None]).sum(-1)
    by_hand = logsumexp(each + np.log(prior.logits.softmax(0).detach().numpy()), axis=-1)
    np.testing.assert_allclose(found.detach(), by_hand, rtol=1e-4)
    assert {name for name, _ in prior.named_parameters()} == {"pseudo_inputs", "logits"}  # nothing of the encoder


def test_a_mixture_that_is_kept_in_a_question_is_forgotten():
    vae = disturbed(built(prior="vamp", n_components=5)).eval()
    cells = some_cells(10, 20, 2)
    with torch.inference_mode():
        first = vae.prior("z", cells)
        assert vae.prior("z", cells) is first
    with torch.no_grad():
        vae.priors["z"].pseudo_inputs.add_(1)
    vae.eval()
    with torch.inference_mode():
        assert not torch.equal(vae.prior("z", cells).component_distribution.mean, first.component_distribution.mean)
    # A loss after a question, without more ado.
    assert vae.prior("z", cells).component_distribution.mean.requires_grad
    vae.train()
    assert vae.prior("z", cells).component_distribution.mean.requires_grad


@pytest.mark.parametrize(("posterior", "prior"), itertools.product(POSTERIORS, PRIORS))
def test_what_every_pair_promises(posterior, prior):
    vae, cells = disturbed(built(posterior, prior)), some_cells(12, 20, 2)
    # Every parameter is learned, from one draw and from several that are weighed.
    for samples in (1, 4):
        vae.zero_grad()
        vae.train()(cells, n_importance_samples=samples).loss(0.5).backward()
        assert not [name for name, w in vae.named_parameters() if w.grad is None or not w.grad.isfinite().all()]
        assert not [name for name, w in vae.named_parameters() if w.numel() and not (w.grad != 0).any()]
    vae.eval()
    with torch.no_grad():
        # Draws and densities agree, whatever the shape of the sample.
        q, p = vae.posteriors["z"](cells), vae.prior("z", cells)
        for shape in ((), (2,), (3, 2)):
            z, log_q = q.rsample_and_log_prob(shape)
            assert (z.shape, log_q.shape) == ((*shape, 12, D), (*shape, 12))
            torch.testing.assert_close(q.log_prob(z), log_q, rtol=1e-3, atol=1e-3)
            assert p.log_prob(z).shape == (*shape, 12)
            assert vae(cells, shape).value.shape == (*shape, 12)
        assert p.sample((4,) if p.batch_shape else (4, 1)).shape[-1] == D
        assert q.mean.shape == q.variance.shape == (12, D)
        torch.testing.assert_close(vae.posteriors["z"].means(cells), q.mean)


@pytest.mark.parametrize("posterior", ["planar", "iaf"])
def test_flows_see_the_batch_and_no_context_is_beyond_one(posterior):
    vae, cells = disturbed(built(posterior), 1.0).eval(), some_cells(12, 20, 2)
    q = vae.posteriors["z"]
    with torch.no_grad():
        for rows in q.base.mlp.layers[0].rows.values():
            rows.zero_()  # the hidden units do not know of it
        other = dataclasses.replace(cells, batch=1 - cells.batch)
        torch.testing.assert_close(q.base.hidden(cells), q.base.hidden(other))
        one, two = q(cells), q(other)
    assert not torch.allclose(one.context, two.context)
    assert (one.context.abs() <= 1).all()
    assert (one.context.abs() > 0.99).any()
    blind = built(posterior, encode_covariates=False).posteriors["z"].eval()
    assert torch.equal(blind(cells).context, blind(other).context)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_log_densities_are_changes_of_variable(posterior):
    """log q(z) is log q(e) - log |det dz/de|, by autograd, of the standard normal noise e that z is drawn from."""
    vae = disturbed(built(posterior)).double().eval()
    cells = some_cells(4, 20, 2)
    cells = dataclasses.replace(cells, counts=cells.counts.double(), library=cells.library.double())
    q = vae.posteriors["z"](cells)

    def draw(noise):
        base = q.base if isinstance(q, FlowDistribution) else q
        base._noise = lambda shape: noise
        return q.rsample_and_log_prob()

    noise = torch.randn(4, D).double()
    _, log_q = draw(noise)
    for i in range(4):
        of_noise = jacobian(lambda e: draw(e)[0], noise)[i, :, i]
        expected = stats.norm.logpdf(noise[i].numpy()).sum() - torch.linalg.slogdet(of_noise)[1].item()
        assert log_q[i].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_extreme_encoders_give_no_nan(posterior):
    for sign, prior in itertools.product((-30.0, 30.0), PRIORS):
        vae = disturbed(built(posterior, prior))
        base = vae.posteriors["z"] if posterior == "normal" else vae.posteriors["z"].base
        with torch.no_grad():
            base.mean.bias.fill_(sign)
            base.log_variance.bias.fill_(sign)
        elbo = vae(some_cells(12, 20, 2))
        assert elbo.value.isfinite().all()
        elbo.loss().backward()
        assert all(weight.grad.isfinite().all() for weight in vae.parameters() if weight.grad is not None)


def test_importance_weighted_bound_is_log_mean_exp():
    vae, cells = disturbed(built()).eval(), some_cells(12, 20, 2)
    with torch.no_grad():
        torch.manual_seed(3)
        elbo = vae(cells, n_importance_samples=50)
        torch.manual_seed(3)
        one_by_one = vae.log_weights(cells, vae.infer(cells), (50,))
    weights = np.exp((one_by_one - one_by_one.max(0).values).double().numpy())
    expected = np.log(weights.mean(0)) + one_by_one.max(0).values.numpy()
    np.testing.assert_allclose(elbo.value, expected, rtol=1e-5)
    assert elbo.loss().item() == pytest.approx(-expected.mean(), rel=1e-5)
    kl = elbo.kl["z"].double().numpy()
    weighed = logsumexp(one_by_one.double().numpy() + kl - 0.3 * kl, axis=0) - np.log(50)
    assert elbo.loss(0.3).item() == pytest.approx(-weighed.mean(), rel=1e-5)
