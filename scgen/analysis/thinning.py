"""Held-out likelihood by binomial thinning: how well the kept counts of a cell predict the held-out counts."""

import math
from copy import copy
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Binomial, Distribution

from scgen.analysis.inference import log_sums
from scgen.data.cells import Cells
from scgen.data.loader import CellLoader
from scgen.modules.vae import VAE, question
from scgen.seeding import seeded


@question
def held_out_log_likelihood(
    vae: VAE, loader: CellLoader, size_factors: bool, held_out: float, n_samples: int, seed: int
) -> np.ndarray:
    """Return log of the mean of p(x_rest | x_kept, z, l, s) over draws z, l ~ q(. | x_kept, s) for each cell, (n,).

    Given z and l, both parts of a count share the gene's rate and its zero inflation. p(x_kept, x_rest) is therefore
    the binomial probability of the split times p(x), at a library size 1 / (1 - held_out) times that of x_kept.
    Dividing by p(x_kept) gives the result. For Poisson counts it is p(x_rest); for others, it also depends on what
    x_kept says about the rate.

    Parameters
    ----------
    vae, loader
        The model and the cells.
    size_factors
        Whether the library is a size factor instead of the total of the counts.
    held_out, n_samples, seed
        As in `ExpressionModel.get_thinned_ll`.
    """
    if not vae.has_library:
        raise ValueError('gene_likelihood="normal" is not a likelihood of counts, and only counts can be thinned.')
    results = []
    as_measured = copy(loader)
    as_measured.impute = None  # genes that were not measured are imputed from the kept counts alone
    with seeded(seed):
        # A separate generator: the split does not depend on the model, its draws or the minibatches.
        rng = np.random.default_rng(seed)
        for cells in as_measured:
            kept, rest = thinned(cells, held_out, size_factors, rng)
            kept = (kept if loader.impute is None else loader.impute(kept)).to(vae.device)
            rest = rest.to(vae.device)
            x = kept.counts + rest
            log_split, present = torch.zeros_like(x, dtype=torch.float64), x > 0
            log_split[present] = Binomial(x[present].double(), held_out).log_prob(rest[present].double())
            draw = partial(_log_ratios, vae, kept, x, 1 / (1 - held_out), vae.infer(kept))
            results.append((log_sums(draw, n_samples)[0] - math.log(n_samples) + log_split.sum(1)).cpu().numpy())
    return np.concatenate(results)


def thinned(cells: Cells, held_out: float, size_factors: bool, rng: np.random.Generator) -> tuple[Cells, Tensor]:
    """Split the counts. Return the cells with the kept counts and their library, and the other counts, (n, G).

    A cell without kept counts is given a library of one count, the smallest that decoders allow.
    """
    counts = cells.counts.to_dense().cpu()
    kept = torch.from_numpy(rng.binomial(counts.numpy().astype(np.int64), 1 - held_out)).to(counts.dtype)
    if size_factors:
        library = cells.library + math.log1p(-held_out)
    else:
        library = kept.sum(1, keepdim=True).clamp(min=1).log()
    return replace(cells, counts=kept, library=library, imputed_counts=None), counts - kept


def _log_ratios(
    vae: VAE, kept: Cells, x: Tensor, factor: float, q: dict[str, Distribution], shape: tuple[int, ...]
) -> Tensor:
    """Return log p(x | z, factor l, s) / p(kept | z, l, s) at draws of z and l from q, (*shape, n)."""
    likelihood = vae.decoder({name: q[name].rsample(shape) for name in q}, kept)
    return likelihood.scaled(factor).log_prob(x) - likelihood.log_prob(kept.counts)
