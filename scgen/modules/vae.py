"""The variational auto-encoder: cells to evidence lower bound in one forward."""

import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from scgen import threads
from scgen.data.cells import Cells
from scgen.distributions import PointMass
from scgen.modules.elbo import Elbo, draw_and_kl
from scgen.modules.networks import WideLinear

#: A thread that waits for its turn looks so often, in seconds, whether the module is being trained meanwhile.
SECONDS_A_TURN = 0.05


class Turns:
    """Whose turn it is to use a module: one thread's at a time, of one process."""

    def __init__(self):
        self.lock, self.training = threading.RLock(), False


class VAE(nn.Module):
    """Latents with a posterior and a prior each, and one decoder that joins them.

    Parameters
    ----------
    posteriors
        By latent, such as "z" and "library": a module ``cells -> q``.
    priors
        By latent: a module ``(cells, posterior) -> p``, which may be made of the latent's posterior.
    decoder
        A module ``(latents, cells) -> likelihood`` of whole cells; ``latents`` maps names to draws (..., n, d). Its
        method ``target(cells)`` returns the part of the cells, (n, ...), that the likelihood is asked about.
    latent
        The latent that is the embedding of the cells.
    """

    def __init__(
        self, posteriors: dict[str, nn.Module], priors: dict[str, nn.Module], decoder: nn.Module, latent: str = "z"
    ):
        super().__init__()
        self.latent = latent
        self.posteriors = nn.ModuleDict(posteriors)
        self.priors = nn.ModuleDict(priors)
        self.decoder = decoder
        self.frozen = False
        self._turns = {os.getpid(): Turns()}

    def __getstate__(self) -> dict:
        """Leave the lock out of copies and pickles: each process and each copy has its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_turns"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._turns = {os.getpid(): Turns()}

    @contextmanager
    def occupied(self, training: bool = False) -> Iterator[None]:
        """Within the block, no other thread trains this module or asks it.

        Waits while another thread asks the module. RuntimeError if another thread trains it, or trained it when this
        process was forked.
        """
        # A process that was forked has none of the threads of the one before, which would never release their lock.
        process = os.getpid()
        if process not in self._turns and any(turns.training for turns in self._turns.values()):
            raise RuntimeError(
                "this process was forked while the model was being trained, and has weights of an unfinished step. "
                "Fork when the training is done, or load a saved model in this process."
            )
        turns = self._turns.setdefault(process, Turns())
        while not turns.lock.acquire(timeout=SECONDS_A_TURN):
            if turns.training:
                raise RuntimeError(
                    "the model is being trained in another thread: its weights change. Ask it, train it or save it "
                    "when that training is done."
                )
        before = turns.training
        turns.training = before or training
        try:
            with threads.adapted():
                yield
        finally:
            turns.training = before
            turns.lock.release()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def has_library(self) -> bool:
        """Whether there is a library size, inferred or observed: in models of counts, but not of normalised values."""
        return "library" in self.posteriors

    def gene_axes(self) -> dict[str, int]:
        """Return, by the name of each parameter that has an axis of genes, which axis that is.

        Modules declare those of their own, in a method of this name.
        """
        return self._declared("gene_axes")

    def category_rows(self) -> dict[str, str | int]:
        """Return, by the name of each parameter with a row for each category, the column that the categories are of.

        That is "batch", "labels", or the place of a further covariate. Modules declare those of their own, in a method
        of this name.
        """
        return self._declared("category_rows")

    def category_codes(self) -> list[Tensor]:
        """Return what modules keep of codes (K, columns) of batch and covariates."""
        return [
            part.category_codes() for part in self.modules() if part is not self and hasattr(part, "category_codes")
        ]

    def _declared(self, what: str) -> dict:
        parts = [(name, part) for name, part in self.named_modules() if name and hasattr(part, what)]
        return {f"{name}.{own}": value for name, part in parts for own, value in getattr(part, what)().items()}

    def minibatches(self, loader: Iterable[Cells]) -> Iterator[Cells]:
        """Iterate over the minibatches of a loader, each on the device of the weights."""
        device = self.device
        return (cells.to(device) for cells in loader)

    def reads_sparse(self, device: torch.device) -> bool:
        """Say whether minibatches are to come as CSR: for counts on a CPU, and where MKL multiplies them."""
        return self.has_library and device.type == "cpu" and torch.backends.mkl.is_available()

    @contextmanager
    def reduced_products(self, reduced: bool) -> Iterator[None]:
        """Within the block, take the products of the layers from or to 512 units and more in bfloat16."""
        wide = [part for part in self.modules() if isinstance(part, WideLinear) and max(part.weight.shape) >= 512]
        try:
            for layer in wide:
                layer.reduced = reduced
            yield
        finally:
            for layer in wide:
                layer.reduced = False

    @torch.no_grad()
    def impute(self, cells: Cells) -> Cells:
        """Return the cells with the counts that are expected of genes that were not measured, for the encoders.

        z is inferred with zeros in their place, and decoded: one step, on the means, of the chain that imputes missing
        values under a trained model (Rezende et al. 2014, section 5). Further steps drift from what was measured
        (benchmarks/NOTES.md).
        """
        cells = cells.to(self.device)
        counts = cells.counts.to_dense()
        zeros = counts.new_zeros(len(counts), self.decoder.n_missing)
        z = self.posteriors["z"].means(replace(cells, imputed_counts=torch.cat([counts, zeros], 1)))
        return replace(cells, imputed_counts=torch.cat([counts, self.decoder.expected_missing({"z": z}, cells)], 1))

    @contextmanager
    def learning_rows(self, known: dict[str, int]) -> Iterator[None]:
        """Within the block, let training change nothing but what belongs to categories added to the ``known`` ones.

        Parameters
        ----------
        known
            By the name of its parameter: the number of rows that stay as they are. If empty, all is learned.
        """
        if not known:
            yield
            return
        before = {
            name: weight[: known[name]].detach().clone() for name, weight in self.named_parameters() if name in known
        }
        hooks = []
        for name, weight in self.named_parameters():
            weight.requires_grad_(name in known)
            if name in known:
                old = (torch.arange(len(weight), device=weight.device) < known[name])[:, None]
                hooks.append(weight.register_hook(lambda gradient, old=old: gradient.masked_fill(old, 0)))
        self.frozen = True
        try:
            yield
        finally:
            self.frozen = False
            for hook in hooks:
                hook.remove()
            with torch.no_grad():
                for name, weight in self.named_parameters():
                    if name in known:
                        weight[: known[name]] = before[name]  # weight decay moves them, too
                    weight.requires_grad_(True)

    def train(self, mode: bool = True) -> "VAE":
        """Start or end training; where only rows are learned, dropout and batch normalisation stay as in questions."""
        return super().train(mode and not self.frozen)

    def infer(self, cells: Cells) -> dict[str, Distribution]:
        """Return q of every latent."""
        return {name: posterior(cells) for name, posterior in self.posteriors.items()}

    def prior(self, name: str, cells: Cells) -> Distribution:
        """Return p of one latent."""
        return self.priors[name](cells, self.posteriors[name])

    def forward(self, cells: Cells, shape: tuple[int, ...] = (), n_importance_samples: int = 1) -> Elbo:
        """Return the bound per cell at draws of the given sample shape, (*shape, n).

        With several importance samples it is the bound of Burda et al. (2016), over as many draws, (*shape, n) too.
        """
        weighted = n_importance_samples > 1
        shape = (n_importance_samples, *shape) if weighted else shape
        latents, kl = {}, {}
        for name, q in self.infer(cells).items():
            latents[name], kl[name] = draw_and_kl(q, self.prior(name, cells), shape, closed_form=not weighted)
        return Elbo(self.decoder(latents, cells).log_prob(self.decoder.target(cells)), kl, weighted)

    def log_weights(self, cells: Cells, q: dict[str, Distribution], shape: tuple[int, ...]) -> Tensor:
        """Return log p(x, latents) - log q(latents | x) at draws from q, which `infer` gave, (*shape, n).

        Their log-mean-exp over the draws estimates log p(x) from below, the closer the more draws.
        """
        return self.log_weights_at(cells, q, {name: q[name].rsample_and_log_prob(shape) for name in q})

    def log_weights_at(
        self, cells: Cells, q: dict[str, Distribution], draws: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Return the same at draws (*shape, n, d) that are given, each latent's with its log q (*shape, n)."""
        likelihood = self.decoder({name: draw for name, (draw, _) in draws.items()}, cells)
        log_w = likelihood.log_prob(self.decoder.target(cells))
        for name, (draw, log_q) in draws.items():
            if not isinstance(q[name], PointMass):
                log_w = log_w + self.prior(name, cells).log_prob(draw) - log_q
        return log_w


def question(ask: Callable) -> Callable:
    """Decorate a function of a `VAE`, its first argument, that asks it something.

    The module answers as it does outside of training, without gradients, and one thread at a time.
    """
    if inspect.isgeneratorfunction(ask):

        def asked(vae, *args, **kwargs):
            with vae.occupied():
                vae.eval()
                yield from ask(vae, *args, **kwargs)

    else:

        def asked(vae, *args, **kwargs):
            with vae.occupied():
                vae.eval()
                return ask(vae, *args, **kwargs)

    return torch.inference_mode()(functools.wraps(ask)(asked))
