"""Flows: determinants against autograd, inverses, densities that integrate to 1, targets that they bend to."""

import math

import numpy as np
import pytest
import torch
from torch.autograd.functional import jacobian

from scgen.distributions import DiagonalNormal, FlowDistribution
from scgen.modules.flows import InverseAutoregressiveFlow, MaskedAutoregressiveFlow, PlanarFlow

FLOWS = {"planar": PlanarFlow, "iaf": InverseAutoregressiveFlow, "maf": MaskedAutoregressiveFlow}


def bent(kind: str, n_latent: int = 3, n_context: int = 4, n_steps: int = 3, spread: float = 0.2):
    """Return a flow, in float64, all of whose parameters are random."""
    torch.manual_seed(0)
    flow = FLOWS[kind](n_latent, n_context, n_steps).double()
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(spread * torch.randn_like(weight))
    return flow


@pytest.mark.parametrize("n_context", [0, 4])
@pytest.mark.parametrize("n_latent", [1, 2, 5])
@pytest.mark.parametrize("kind", FLOWS)
def test_determinants_and_inverses(kind, n_latent, n_context):
    flow = bent(kind, n_latent, n_context)
    z, context = torch.randn(6, n_latent).double(), torch.randn(6, n_context).double()
    moved, log_det = flow(z, context)
    for i in range(len(z)):
        numeric = jacobian(lambda one, i=i: flow(one[None], context[i : i + 1])[0][0], z[i])
        _, value = torch.linalg.slogdet(numeric)
        assert log_det[i].item() == pytest.approx(value.item(), abs=1e-8)
    back, log_det_back = flow.inverse(moved, context)
    torch.testing.assert_close(back, z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["iaf", "maf"])
def test_outputs_see_only_what_comes_before(kind):
    step = bent(kind, 5).steps[0]
    z, context = torch.randn(1, 5).double(), torch.randn(1, 4).double()
    for output in (0, 1):
        seen = jacobian(lambda z, output=output: step(z, context)[output], z)[0, :, 0]
        assert (seen.triu() == 0).all()
        assert (seen[np.tril_indices(5, -1)] != 0).all()  # and all of that
        of_context = jacobian(lambda c, output=output: step(z, c)[output], context)[0, :, 0]
        assert (of_context != 0).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planar_steps_can_be_inverted_whatever_the_head_says(dtype):
    torch.manual_seed(0)
    flow = PlanarFlow(4, 9, 1).to(dtype)
    with torch.no_grad():
        for weight in flow.parameters():
            weight.zero_()
        # The context is the step: u, w, b.
        flow.bends.weight[:, :4], flow.directions.weight[:, 4:8] = (
            3 * torch.eye(4, dtype=dtype),
            3 * torch.eye(4, dtype=dtype),
        )
    asked = torch.randn(10_000, 9, dtype=dtype) * torch.tensor([10.0] * 4 + [5.0] * 4 + [0.0])
    asked[:100, 4:8] *= 1e-4  # and directions that hardly are one, or none
    asked[:10, 4:8] = 0
    ((w, _, u, slope),) = flow._steps(asked)
    along = (w.double() * u.double()).sum(1)
    assert (along > -1).all()
    torch.testing.assert_close(slope.double() - 1, along, rtol=1e-3, atol=1e-3)
    assert torch.stack([w, u]).isfinite().all()
    assert (along < -0.99).any()  # the bound was met


@pytest.mark.parametrize("kind", FLOWS)
def test_gradients_of_densities_are_finite_differences(kind):
    flow = bent(kind, 2, 0)
    q = FlowDistribution(
        DiagonalNormal(torch.zeros(2).double(), torch.ones(2).double()), flow, torch.zeros(1, 0).double()
    )
    z = torch.tensor([[0.3, -0.8]]).double()
    for values in (z, *flow.parameters()):
        if not values.numel():
            continue
        values.requires_grad_()
        (gradient,) = torch.autograd.grad(q.log_prob(z).sum(), values)
        direction = torch.randn_like(values)
        with torch.no_grad():
            sides = []
            for sign in (1, -2):
                values.add_(sign * 1e-5 * direction)
                sides.append(q.log_prob(z).sum().item())
            values.add_(1e-5 * direction)
        assert (gradient * direction).sum().item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4, abs=1e-6)


def test_more_components_than_hidden_units_are_all_seen():
    step = InverseAutoregressiveFlow(7, 0, 1, n_hidden=3).double().steps[0]
    with torch.no_grad():
        for weight in step.parameters():
            weight.normal_()
    z = torch.randn(1, 7).double()
    seen = jacobian(lambda z: step(z, torch.zeros(1, 0).double())[0], z)[0, :, 0]
    assert (seen[np.tril_indices(7, -1)] != 0).all()


def test_planar_starts_as_the_identity():
    torch.manual_seed(0)
    z, context = torch.randn(50, 4), torch.randn(50, 6)
    moved, log_det = PlanarFlow(4, 6, 8)(z, context)
    torch.testing.assert_close(moved, z, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, torch.zeros(50), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_autoregressive_flows_start_as_scales(n_steps):
    z, context = torch.randn(50, 4), torch.randn(50, 6)
    moved, log_det = InverseAutoregressiveFlow(4, 6, n_steps)(z, context)
    gate = 1 / (1 + math.exp(-2.0))
    in_order = z.flip(-1) if n_steps % 2 == 0 else z
    torch.testing.assert_close(moved, gate**n_steps * in_order)
    torch.testing.assert_close(log_det, torch.full((50,), n_steps * 4 * math.log(gate)))
    moved, log_det = MaskedAutoregressiveFlow(4, 6, n_steps)(z, context)
    torch.testing.assert_close(moved, in_order)
    torch.testing.assert_close(log_det, torch.zeros(50))


@pytest.mark.parametrize("kind", FLOWS)
def test_densities_integrate_to_one(kind):
    flow = bent(kind, 2, 0, spread=0.3)
    q = FlowDistribution(
        DiagonalNormal(torch.zeros(2).double(), torch.ones(2).double()), flow, torch.zeros(1, 0).double()
    )
    axis = torch.linspace(-8, 8, 201).double()
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = q.log_prob(grid[:, None, :]).exp()
        assert density.sum().item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1, abs=1e-2)
        # And it is the density of the draws: the mean of another density over it is 1.
        z, log_q = q.rsample_and_log_prob((20_000, 1))
        other = DiagonalNormal(torch.zeros(2).double(), torch.full((2,), 0.25).double())
        ratio = (other.log_prob(z) - log_q).exp().flatten()
    assert abs(ratio.mean().item() - 1) < 4 * ratio.std().item() / len(ratio) ** 0.5
    torch.testing.assert_close(q.log_prob(z), log_q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", FLOWS)
def test_moments_are_those_of_draws(kind):
    torch.manual_seed(1)
    mean, variance = torch.tensor([[2.0, -1], [0.5, 1]]).double(), torch.tensor([[0.5, 1], [2, 0.1]]).double()
    q = FlowDistribution(DiagonalNormal(mean, variance), bent(kind, 2, 4), torch.randn(2, 4).double())
    with torch.no_grad():
        z = q.rsample((50_000,))
        # A hundred draws: the mean is within some tenths of a deviation, the variance within some tenths of itself.
        assert ((q.mean - z.mean(0)).abs() < 0.3 * z.std(0)).all()
        assert ((q.variance / z.var(0)).log().abs() < 0.6).all()
        assert torch.equal(q.mean, q.mean)
        one = FlowDistribution(DiagonalNormal(mean[1:], variance[1:]), q.flow, q.context[1:])
        torch.testing.assert_close(one.mean, q.mean[1:])


def energies() -> dict:
    """Return U1 to U4 of Rezende and Mohamed (2015), in a soft box, without which they could not be normalised."""

    def box(z):
        return ((z.abs() - 4).clamp(min=0) ** 2).sum(-1) / (2 * 0.25**2)

    def ring(z):
        sides = torch.logaddexp(-0.5 * ((z[..., 0] - 2) / 0.6) ** 2, -0.5 * ((z[..., 0] + 2) / 0.6) ** 2)
        return 0.5 * ((z.norm(dim=-1) - 2) / 0.4) ** 2 - sides + box(z)

    def w1(z):
        return (math.pi * z[..., 0] / 2).sin()

    def wave(z):
        return 0.5 * ((z[..., 1] - w1(z)) / 0.4) ** 2 + box(z)

    def two(other, width):
        def energy(z):
            first = -0.5 * ((z[..., 1] - w1(z)) / width) ** 2
            second = -0.5 * ((z[..., 1] - w1(z) + other(z[..., 0])) / 0.35) ** 2
            return -torch.logaddexp(first, second) + box(z)

        return energy

    bump = two(lambda x: 3 * torch.exp(-0.5 * ((x - 1) / 0.6) ** 2), 0.35)
    step = two(lambda x: 3 * torch.sigmoid((x - 1) / 0.3), 0.4)
    return {"U1": ring, "U2": wave, "U3": bump, "U4": step}


@pytest.mark.parametrize("target", energies())
def test_more_steps_come_nearer_to_targets(target):
    energy = energies()[target]
    axis = torch.linspace(-6, 6, 600).double()
    log_z = (-energy(torch.cartesian_prod(axis, axis))).logsumexp(0).item() + 2 * math.log(axis[1] - axis[0])
    found = []
    for n_steps in (1, 16):
        torch.manual_seed(0)
        flow, log_scale = PlanarFlow(2, 0, n_steps), torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.Adam([*flow.parameters(), log_scale], 0.01)

        def free_energy(n, flow=flow, log_scale=log_scale):
            q = FlowDistribution(DiagonalNormal(torch.zeros(2), (2 * log_scale).exp()), flow, torch.zeros(1, 0))
            z, log_q = q.rsample_and_log_prob((n, 1))
            return log_q + energy(z)

        for _ in range(1000):
            optimizer.zero_grad()
            free_energy(200).mean().backward()
            optimizer.step()
        with torch.no_grad():
            found.append(free_energy(50_000))
    means, errors = zip(*((one.mean().item(), one.std().item() / len(one) ** 0.5) for one in found), strict=True)
    assert all(mean + log_z > -4 * error for mean, error in zip(means, errors, strict=True))  # KL >= 0
    assert means[1] < means[0] - 0.2
