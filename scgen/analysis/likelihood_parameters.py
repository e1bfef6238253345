"""Parameters of p(x | z, l, s), to compute it outside of scgen."""

import math

import numpy as np
from torch import Tensor
from torch.distributions import Distribution, Normal

from scgen.analysis.counterfactual import Asked, as_if
from scgen.arguments import check_memory
from scgen.data.cells import Cells
from scgen.data.loader import CellLoader
from scgen.distributions import NegativeBinomial, ZeroInflatedNegativeBinomial
from scgen.modules.vae import VAE, question
from scgen.seeding import seeded


@question
def likelihood_parameters(
    vae: VAE,
    loader: CellLoader,
    asked: Asked,
    n_samples: int | None,
    give_mean: bool,
    seed: int,
) -> dict[str, np.ndarray]:
    """Return the parameters of each cell's likelihood, by name; see `ExpressionModel.get_likelihood_parameters`.

    Parameters
    ----------
    vae, loader
        The model and the n cells.
    asked
        Conditions to average the parameters over, and genes to return.
    n_samples
        Number of draws of the latents; None uses the means of q.
    give_mean, seed
        Whether to average over the draws; seed of the draws.
    """
    n_draws = n_samples or 1
    keep = 1 if give_mean else n_draws
    shape = keep, len(loader.index), len(asked.genes)
    fewer = "Choose fewer draws, their mean (give_mean=True), fewer cells or fewer genes."
    check_memory("n_samples", n_samples, 4 * math.prod(shape), fewer)
    found: dict[str, np.ndarray] = {}
    start = 0
    with seeded(seed):
        for cells in vae.minibatches(loader):
            q = vae.infer(cells)
            rows = slice(start, start + len(cells))
            for draw in range(n_draws):
                latents = {name: q[name].mean if n_samples is None else q[name].rsample() for name in q}
                for name, values in _mean_parameters(vae, latents, cells, asked).items():
                    if name not in found:
                        found[name] = np.zeros(shape, np.float32)
                    found[name][draw % keep, rows] += (values * (keep / n_draws)).cpu().numpy()
            start = rows.stop
    return {name: values[0] if keep == 1 else values for name, values in found.items()}


def _mean_parameters(vae: VAE, latents: dict[str, Tensor], cells: Cells, asked: Asked) -> dict[str, Tensor]:
    """Return the parameters of the chosen genes, (n, genes) or (genes,), averaged over the conditions."""
    total: dict[str, Tensor] = {}
    for condition in asked.conditions:
        for name, values in _parameters(vae.decoder(latents, as_if(cells, condition))).items():
            values = asked.of_genes(values) / len(asked.conditions)
            total[name] = total[name] + values if name in total else values
    return total


def _parameters(likelihood: Distribution) -> dict[str, Tensor]:
    """Return the parameters of each gene's own distribution, (n, G) or (G,), under scvi-tools' names."""
    gene = likelihood.base_dist
    if isinstance(gene, Normal):
        return {"mean": gene.loc, "scale": gene.scale}
    found = {"mean": gene.mu}
    if isinstance(gene, ZeroInflatedNegativeBinomial):
        found["dropout"] = gene.zi_logits.sigmoid()
    if isinstance(gene, NegativeBinomial):
        found["dispersions"] = gene.theta
    return found
