"""Encoders and decoder of niches: what turns with them, what does not, and that padding has no influence."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from scgen.modules.niches import (
    EquivariantAngle,
    FreeAngle,
    InvariantEncoder,
    NicheDecoder,
    NicheEncoder,
    NichePosterior,
    Niches,
    UniformAngle,
    products_with_conjugate,
    squared,
    turned,
)
from scgen.modules.priors import StandardNormalPrior
from scgen.modules.vae import VAE
from scgen.seeding import seeded

N, J, F = 40, 7, 5


@pytest.fixture
def niches() -> Niches:
    rng = np.random.default_rng(0)
    radius, direction = np.sqrt(rng.random((N, J))), rng.uniform(0, 2 * np.pi, (N, J))
    offsets = radius[..., None] * np.stack([np.cos(direction), np.sin(direction)], -1)
    offsets[:, 0] = 0
    mask = rng.random((N, J)) < 0.8
    mask[:, 0] = True
    offsets[~mask] = 0
    codes = torch.arange(N) % 2
    features = torch.from_numpy(rng.poisson(3.0, (N, J, F)).astype(np.float32))
    return Niches(
        counts=features[:, 0],
        library=torch.zeros(N, 1),
        batch=codes,
        labels=codes,
        categorical=torch.zeros(N, 0, dtype=torch.int64),
        continuous=torch.zeros(N, 0),
        index=torch.arange(N),
        features=features,
        offsets=torch.from_numpy(offsets.astype(np.float32)),
        mask=torch.from_numpy(mask),
    )


def model(likelihood="nb", angle=EquivariantAngle) -> VAE:
    with seeded(0):
        theta = angle(F, 16, likelihood != "normal", *((True,) if angle is FreeAngle else ()))
        sizes = 16, likelihood != "normal"
        z = NicheEncoder(F, 6, *sizes) if angle is FreeAngle else InvariantEncoder(F, 6, *sizes)
        if angle is not FreeAngle:  # before a training, z hardly depends on the arrangement
            z.weights.weight.data *= 2
        shift = NicheEncoder(F, 4, *sizes, None if angle is FreeAngle else theta)
        posteriors = {"rotation": theta, "z": NichePosterior(z), "translation": NichePosterior(shift)}
        priors = {"rotation": UniformAngle(), "z": StandardNormalPrior(3), "translation": StandardNormalPrior(2)}
        return VAE(posteriors, priors, NicheDecoder(likelihood, 3, F, 16, 2))


def rotated(niches: Niches, angle: float) -> Niches:
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # of rows, counter-clockwise
    return dataclasses.replace(niches, offsets=torch.from_numpy((niches.offsets.numpy() @ turn).astype(np.float32)))


def circular_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.remainder(a - b + math.pi, 2 * math.pi).sub(math.pi).abs().max().item()


def test_positions_turn_counter_clockwise():
    angle = torch.tensor(0.7)
    found = turned(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), angle.cos(), angle.sin())
    np.testing.assert_allclose(found, [[0.7648421873, 0.6442176872], [-0.6442176872, 0.7648421873]], atol=1e-7)


def test_products_are_those_of_complex_numbers():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, n)) + 1j * rng.normal(size=(2, n)) for n in (3, 4))
    pairs = [torch.from_numpy(np.stack([value.real, value.imag], -1)) for value in (a, b)]
    products = a[:, :, None] * b.conj()[:, None]
    expected = np.concatenate([products.real, products.imag], -1).reshape(2, -1)
    np.testing.assert_allclose(products_with_conjugate(*pairs), expected)
    np.testing.assert_allclose(torch.view_as_complex(squared(pairs[0])), a**2)


def test_z_tells_mirror_images_and_other_arrangements_of_the_same_cells_apart(niches):
    encoder = model().eval().posteriors["z"].encoder
    distances = niches.offsets.norm(dim=-1)
    rng = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(distances.shape, generator=rng)
    others = {
        "mirrored": niches.offsets * torch.tensor([1.0, -1.0]),
        "other": distances[..., None] * torch.stack([angle.cos(), angle.sin()], -1),
    }
    found = {name: encoder(dataclasses.replace(niches, offsets=offsets)) for name, offsets in others.items()}
    for name, outputs in found.items():
        assert (outputs - encoder(niches)).abs().amax(-1).median() > 0.01, name


@pytest.mark.parametrize("alpha", [0.4, 2.0, -3.0])
def test_the_angle_turns_with_the_niche_and_z_does_not(niches, alpha):
    vae = model().eval().requires_grad_(False)
    before, after = (vae.infer(of) for of in (niches, rotated(niches, alpha)))
    assert circular_distance(after["rotation"].mean, before["rotation"].mean + alpha) < 1e-4
    np.testing.assert_allclose(after["rotation"].scale, before["rotation"].scale, rtol=1e-4)
    for name, part in itertools.product(("z", "translation"), ("mean", "variance")):
        expected = getattr(before[name], part)
        np.testing.assert_allclose(getattr(after[name], part), expected, rtol=1e-3, atol=1e-4)
    free = model(angle=FreeAngle).eval().requires_grad_(False)
    assert circular_distance(*(free.infer(of)["rotation"].mean for of in (niches, rotated(niches, alpha)))) > 1e-3


def test_the_decoder_turns_back_by_theta(niches):
    decoder = model().decoder
    rng = torch.Generator().manual_seed(0)
    latents = {"z": torch.randn(N, 3, generator=rng), "rotation": torch.randn(N, 1, generator=rng)}
    expected = decoder(latents, niches).mean
    found = decoder(latents | {"rotation": latents["rotation"] + 1.3}, rotated(niches, 1.3)).mean
    np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-4)
    still = decoder(latents | {"rotation": torch.zeros(N, 1)}, niches).mean
    np.testing.assert_allclose(decoder({"z": latents["z"]}, niches).mean.detach(), still.detach(), rtol=1e-5)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "normal"])
def test_padding_has_no_influence_on_the_bound_and_its_gradients(niches, likelihood):
    damaged = dataclasses.replace(
        niches,
        features=niches.features.masked_fill(~niches.mask[..., None], 50.0),
        offsets=niches.offsets.masked_fill(~niches.mask[..., None], 0.7),
    )
    found = []
    for cells in (niches, damaged):
        vae = model(likelihood).train()
        with seeded(1):
            loss = vae(cells).loss()
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in vae.parameters())])
    for expected, value in zip(*found, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "normal"])
def test_the_likelihood_is_the_sum_over_the_cells_that_are_there(niches, likelihood):
    vae = model(likelihood).eval()
    with seeded(0), torch.no_grad():
        latents = {name: q.rsample((2,)) for name, q in vae.infer(niches).items()}
        found = vae.decoder(latents, niches)
        each = found.base_dist.log_prob(niches.features.flatten(0, 1)).unflatten(1, (N, J)).sum(-1)
    expected = np.zeros((2, N))
    for i in range(N):
        for j in range(J):
            if niches.mask[i, j]:
                expected[:, i] += each[:, i, j].numpy()
    np.testing.assert_allclose(found.log_prob(niches.features).detach(), expected, rtol=1e-4)
    if likelihood != "normal":  # expected counts of a cell sum to its total, but for added zeros
        totals = found.base_dist.mu.sum(-1).unflatten(1, (N, J))
        np.testing.assert_allclose(totals.detach(), niches.features.sum(-1).expand(2, -1, -1), rtol=1e-4)


def test_weights_of_the_angle_are_stored_once():
    names = list(model().state_dict())
    assert not any("encoder.angle" in name for name in names)
    assert any(name.startswith("posteriors.rotation") for name in names)
