"""Simulated cells have the moments that their truth says."""

import numpy as np
import pytest
import torch

import scgen


def test_counts_have_the_moments_of_the_truth():
    adata = scgen.simulate_cells(4000, 30, n_batches=2, zero_inflation=0.2, seed=1)
    kept = 1 / (1 + np.exp(adata.var["zi_logit"].to_numpy()))
    mu = np.exp(adata.obs["log_library"].to_numpy())[:, None] * adata.layers["true_scale"]
    theta = np.exp(adata.var["log_theta"].to_numpy())
    x = adata.X.toarray()
    mean = kept * mu
    variance = mean * (1 + mu / theta + (1 - kept) * mu)
    standard_error = np.sqrt(variance.sum(0))
    assert (np.abs((x - mean).sum(0)) < 4 * standard_error).all()
    np.testing.assert_allclose(adata.layers["true_scale"].sum(1), 1, rtol=1e-5)
    assert ((x >= 0) & (x == x.round())).all()
    assert x.sum(1).min() > 0


def test_seeds():
    state = torch.get_rng_state()
    one, two, other = (scgen.simulate_cells(50, 20, seed=seed) for seed in (0, 0, 1))
    assert (one.X != two.X).nnz == 0
    assert (one.X != other.X).nnz > 0
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "wrong", [{"n_cells": 0}, {"n_types": 0}, {"n_genes": 2.5}, {"zero_inflation": 1.0}, {"mean_library": 0.0}]
)
def test_wrong_sizes(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        scgen.simulate_cells(**wrong)
