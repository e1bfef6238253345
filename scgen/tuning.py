"""Settings chosen by successive halving: many trained shortly, few longer, one in full."""

import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from tqdm.auto import tqdm

from scgen.data.checks import check_whole, did_you_mean
from scgen.data.registry import Registry
from scgen.models.scvi import SCVI
from scgen.training import choose_device, default_batch_size, default_epochs

#: Named arguments of `SCVI`, for ``SCVI(adata, **PRESETS["nb"])``.
PRESETS: dict[str, dict] = {
    # The default. Zeros beyond the negative binomial's, as of genes that are off in a part of a state's cells.
    "zinb": {},
    # Counts of molecules (UMI), most of all few of them: these seldom have more zeros than the negative binomial's.
    "nb": {"gene_likelihood": "nb"},
    # Ten thousand cells and more of many types: a state with more dimensions, and networks that bend more.
    "nb-deep": {"gene_likelihood": "nb", "n_layers": 2, "n_latent": 30},
    # Many genes, and fine differences between states.
    "nb-wide": {"gene_likelihood": "nb", "n_hidden": 256},
    # Batches of different noise, as of several protocols. Of no use with one batch, and then left out by `tune`.
    "nb-batch": {"gene_likelihood": "nb", "dispersion": "gene-batch"},
    # Totals that are sequencing depth and nothing else: l is the cell's total, as in scvi-tools by default.
    "nb-observed": {"gene_likelihood": "nb", "use_observed_lib_size": True},
}


#: A short training has so many steps, in minibatches of so many cells, or more: few passes, and still many steps.
LEAST_STEPS, LEAST_BATCH = 75, 32
#: At most so many validation cells are scored, with so many draws of the latents.
MAX_SCORED_CELLS, N_SAMPLES = 500, 10
#: Neighbours are looked for among so many cells at most.
MAX_MIXED_CELLS = 5000
#: With fewer cells, hardly any would be left to compare candidates on.
LEAST_CELLS = 100
#: The table's.
COLUMNS = [
    *("candidate", "rung", "epochs", "batch_size", "log_likelihood", "difference", "difference_se", "mixing"),
    *("seconds", "kept", "reason"),
]


@dataclass(frozen=True)
class Rung:
    """A round of short trainings: their passes and minibatches, and how many candidates go on."""

    epochs: int
    batch_size: int
    keep: int


@dataclass(frozen=True)
class Tuning:
    """What `tune` chose, and on which grounds.

    Attributes
    ----------
    model
        The chosen candidate, trained in full.
    best
        Its name.
    table
        A row per candidate and rung, the better first: "candidate"; "rung", from 1; "epochs" trained and
        "batch_size"; "log_likelihood", of the held-out counts, nats per cell; "difference" to the best of the rung, and
        its standard error "difference_se", over the cells; "mixing" of the batches, 1 where neighbours are as of
        chance, NaN of one batch; "seconds", of the training and its scores; whether it was "kept", and the "reason".
        The last row is that of ``model``.
    """

    model: SCVI
    best: str
    table: pd.DataFrame


def tune(
    adata: AnnData,
    *,
    presets: Sequence[str] | Mapping[str, Mapping] | None = None,
    max_epochs: int | None = None,
    accelerator: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Tuning:
    """Choose the settings of `SCVI` for these cells by successive halving, and train the chosen ones in full.

    All candidates are trained shortly, the best two of them anew for twice as long, and the better one in full. A short
    training is a whole one, its learning rate risen and fallen: the passes over the cells, k, that 75 small minibatches
    take. From 2,700 cells on k is 1; of fewer cells it is more, up to an eighth of the full training's epochs. So n
    candidates take k (n + 4) epochs and a full training. They are compared on the cells that validate, a tenth of each
    batch, the same for all.

    Parameters
    ----------
    adata
        Cells x genes, with counts, set up by `setup_anndata`. Nothing is written to it.
    presets
        Names out of ``scgen.PRESETS``, or candidates of your own: a mapping of names to arguments of `SCVI`. None
        stands for all presets: "zinb", the default, allows for zeros beyond the negative binomial's; "nb", good for
        counts of molecules, does not; "nb-deep", for many cells of many types, has two layers and 30 latents; "nb-wide"
        256 hidden units, for many genes; "nb-batch" a dispersion for each batch, for several protocols, and is left out
        where there is one batch; "nb-observed" takes the cell's total for the library, as scvi-tools does.
    max_epochs
        Of the full training; None stands for the default of `SCVI.train`.
    accelerator
        As in `SCVI.train`.
    seed
        Seed of the initial weights, the held-out cells and all noise.
    progress
        Whether to show what is being tried, and then the progress of the full training.

    Returns
    -------
    A `Tuning`: the model, the name of its settings and a table of all that was tried. The model is what
    ``SCVI(adata, seed=seed, **settings)`` and ``train(max_epochs, accelerator=accelerator, seed=seed)`` give.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If ``adata`` was not set up, or with ``counts=False``, has too few cells, or a candidate is unknown or no
        setting of `SCVI` for counts.
    FloatingPointError
        If the loss of every candidate, or of the chosen one in full, becomes NaN or infinite.
    KeyboardInterrupt
        Ctrl-C ends all of it, the full training too.

    Notes
    -----
    Scores are log-likelihoods of held-out counts, given the others, as `SCVI.get_thinned_ll` estimates them with 10
    draws on 500 of the validation cells at most: they compare across likelihoods and treatments of the library, which
    bounds and marginal likelihoods do not. "mixing" is the share of other batches among a cell's 15 nearest neighbours,
    divided by what chance would give. Batches that differ in composition cannot, and should not, reach 1; so mixing
    decides only among candidates whose likelihood is within one standard error, of the paired differences by cell, of
    the best one's.

    The weights kept of a training are those of the best epoch for the validation cells, which makes their scores a
    little too good, those of all candidates alike. For the quality of ``model`` itself, hold out cells of your own.
    Short trainings favour what learns fast: a candidate that needs many steps can lose to one that it would overtake,
    and those that would end within a nat or so of each other are not told apart (``benchmarks/NOTES.md``).
    A candidate whose loss is not finite is out, and the table says so.

    References
    ----------
    Jamieson and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization, AISTATS 51 (2016)
    240: successive halving.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_cells(n_cells=200, n_genes=30, seed=0)
    >>> scgen.setup_anndata(adata, batch_key="batch")
    >>> tuning = scgen.tune(adata, presets=["zinb", "nb", "nb-observed"], max_epochs=3, progress=False)
    >>> tuning.best in scgen.PRESETS, tuning.model.is_trained
    (True, True)
    >>> tuning.table[["rung", "epochs"]].values.tolist()
    [[1, 1], [1, 1], [1, 1], [2, 2], [2, 2], [3, 3]]
    """
    if max_epochs is not None:
        check_whole("max_epochs", max_epochs, 1)
    candidates = _candidates(adata, presets)
    models = {name: _model(adata, name, arguments, seed) for name, arguments in candidates.items()}
    rungs = [rung for rung in _rungs(adata.n_obs, choose_device(accelerator), max_epochs) if rung.keep < len(models)]
    n_short = sum([len(models), *(rung.keep for rung in rungs)][: len(rungs)])
    tables = []
    with tqdm(total=n_short, desc="tuning", unit="training", disable=not progress) as bar:
        for number, rung in enumerate(rungs, start=1):
            trials = []
            for name, model in models.items():
                bar.set_postfix_str(name)
                trials.append(_short_trial(model, name, rung, accelerator, seed))
                bar.update()
            tables.append(_ranking(trials, rung.keep).assign(rung=number))
            kept = tables[-1].loc[tables[-1]["kept"], "candidate"]
            models = {name: _model(adata, name, candidates[name], seed) for name in kept}
    ((best, model),) = models.items()
    last = _full_trial(model, best, max_epochs, accelerator, seed, progress)
    tables.append(_ranking([last], 1).assign(rung=len(rungs) + 1, reason="trained in full"))
    return Tuning(model, best, pd.concat(tables, ignore_index=True)[COLUMNS])


@dataclass(frozen=True)
class Trial:
    """One training of a candidate, and its score: by held-out cell, (n,); None, and the error, if it failed."""

    candidate: str
    epochs: int
    batch_size: int
    seconds: float
    log_likelihood: np.ndarray | None = None
    mixing: float = math.nan
    error: str = ""

    @property
    def value(self) -> float:
        """The mean log-likelihood, in nats per cell."""
        return math.nan if self.log_likelihood is None else float(self.log_likelihood.mean())


def mixing(z: np.ndarray, batch: np.ndarray, n_neighbors: int = 15) -> float:
    """Return the share of other batches among the cells' nearest neighbours, divided by what chance would give.

    NaN where there is one batch.

    Parameters
    ----------
    z
        (n, d) embedding.
    batch
        (n,) names or codes.
    n_neighbors
        Neighbours of each cell, besides itself; fewer where there are no more cells.

    Examples
    --------
    >>> z = np.random.default_rng(0).normal(size=(1000, 2))
    >>> batch = np.repeat(["a", "b"], 500)
    >>> round(mixing(z, batch), 1), mixing(z + 100 * (batch == "b")[:, None], batch)
    (1.0, 0.0)
    """
    from sklearn.neighbors import NearestNeighbors

    _, codes, sizes = np.unique(batch, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return math.nan
    neighbors = NearestNeighbors(n_neighbors=min(n_neighbors, len(z) - 1)).fit(z).kneighbors(return_distance=False)
    by_chance = (len(z) - sizes[codes]) / (len(z) - 1)
    return float((codes[neighbors] != codes[:, None]).mean() / by_chance.mean())


def _candidates(adata: AnnData, presets: Sequence[str] | Mapping[str, Mapping] | None) -> dict[str, dict]:
    """Return the arguments of each candidate by its name; raise where cells or candidates cannot be compared."""
    registry = Registry.of(adata, labels=False)
    if not registry.setup.counts:
        raise ValueError(
            "the data were set up with counts=False, but candidates are compared by held-out counts. Set counts up, "
            'setup_anndata(adata, layer="counts"), or train SCVI(adata, gene_likelihood="normal") without tune.'
        )
    if adata.n_obs < LEAST_CELLS:
        raise ValueError(
            f"adata has {adata.n_obs} cells: a tenth of them would be too few to compare candidates on; tune needs "
            f"{LEAST_CELLS}. Train SCVI(adata) with its defaults."
        )
    if presets is None:
        several = len(registry.batches) > 1
        return {name: of for name, of in PRESETS.items() if several or of.get("dispersion") != "gene-batch"}
    if isinstance(presets, str) or not isinstance(presets, Mapping | Sequence):
        raise TypeError(f"presets={presets!r}; it takes a list of names, or a mapping of names to arguments of SCVI.")
    if not presets:
        raise ValueError(f"presets is empty; choose among {', '.join(PRESETS)}, or None for all.")
    if not isinstance(presets, Mapping):
        for name in presets:
            if name not in PRESETS:
                hint = did_you_mean(str(name), list(PRESETS))
                raise ValueError(f"presets: {name!r} is unknown; there are {', '.join(PRESETS)}.{hint}")
        return {name: PRESETS[name] for name in presets}
    for name, arguments in presets.items():
        _check_arguments(name, arguments)
    return {name: dict(arguments) for name, arguments in presets.items()}


def _check_arguments(name: str, arguments: Mapping) -> None:
    """Raise where a candidate has other arguments than those of `SCVI` for counts."""
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise TypeError(f'presets: {name!r}: {arguments!r}; write it {{"name": {{"n_latent": 20}}}}.')
    known = [key for key in inspect.signature(SCVI).parameters if key not in ("adata", "seed")]
    for key in arguments:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ValueError(f'presets["{name}"]: {key!r} is no setting of SCVI; these are {", ".join(known)}.{hint}')
    if arguments.get("gene_likelihood") == "normal":
        raise ValueError(
            f'presets["{name}"]: gene_likelihood="normal" is not one of counts, and cannot be compared with those that '
            "are. Leave it out."
        )


def _model(adata: AnnData, name: str, arguments: Mapping, seed: int) -> SCVI:
    """Return an untrained candidate; an error says which one it is of."""
    try:
        return SCVI(adata, seed=seed, **arguments)
    except ValueError as error:
        raise ValueError(f'candidate "{name}": {error}') from error


def _rungs(n_cells: int, device: torch.device, max_epochs: int | None) -> list[Rung]:
    """Return the rounds before the full training: as many passes as `LEAST_STEPS` take, then twice as many."""
    n_training = round(0.9 * n_cells)
    full = default_batch_size(n_training, device)
    most = (max_epochs or default_epochs(math.ceil(n_training / full))) // 8
    batch_size = min(max(n_training // LEAST_STEPS, LEAST_BATCH), full)
    epochs = max(min(math.ceil(LEAST_STEPS * batch_size / n_training), most), 1)
    return [Rung(epochs, batch_size, keep=2), Rung(2 * epochs, batch_size, keep=1)]


def _short_trial(model: SCVI, name: str, rung: Rung, accelerator: str, seed: int) -> Trial:
    """Train a candidate for a rung, and score it; a loss that is not finite is its end, and not that of others."""
    started = time.perf_counter()
    options = {"early_stopping": False, "accelerator": accelerator, "seed": seed, "progress": False}
    try:
        model.train(rung.epochs, batch_size=rung.batch_size, **options)
    except FloatingPointError as error:
        return Trial(name, len(model.history), rung.batch_size, time.perf_counter() - started, error=str(error))
    return _scored(model, name, seed, started)


def _full_trial(model: SCVI, name: str, max_epochs: int | None, accelerator: str, seed: int, progress: bool) -> Trial:
    """Train the chosen candidate by the defaults of `SCVI.train`, and score it."""
    started = time.perf_counter()
    model.train(max_epochs, accelerator=accelerator, seed=seed, progress=progress)
    return _scored(model, name, seed, started)


def _scored(model: SCVI, name: str, seed: int, started: float) -> Trial:
    """Return how likely held-out counts are, and how well batches mix; raise if the training was interrupted."""
    if not model.trainings[-1]["finished"]:
        raise KeyboardInterrupt  # which `train` takes as the wish for an early end
    held_out = _some(model.validation_indices, MAX_SCORED_CELLS, seed)
    values = model.get_thinned_ll(indices=held_out, n_samples=N_SAMPLES, return_mean=False, seed=seed)
    key, mixed = model.registry.setup.batch_key, math.nan
    if len(model.registry.batches) > 1:
        rows = _some(np.arange(model.adata.n_obs), MAX_MIXED_CELLS, seed)
        batch = model.adata.obs[key].astype(str).to_numpy()[rows]
        mixed = mixing(model.get_latent_representation(indices=rows), batch)
    batch_size, seconds = model.trainings[-1]["batch_size"], time.perf_counter() - started
    return Trial(name, len(model.history), batch_size, seconds, values, mixed)


def _some(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return the rows, or so many of them at random, the same for the same seed."""
    return np.sort(np.random.default_rng(seed).permutation(rows)[:most])


def _ranking(trials: Sequence[Trial], keep: int) -> pd.DataFrame:
    """Return a row for each trial, the better first, and whether it is one of those that are kept.

    Those within one standard error of the best likelihood come first, by their mixing; then the others by likelihood.
    """
    sound = [trial for trial in trials if np.isfinite(trial.value)]
    if not sound:
        raise FloatingPointError(f'no candidate could be trained; "{trials[0].candidate}": {trials[0].error}')
    best = max(sound, key=lambda trial: trial.value)
    rows = sorted((_row(trial, best) for trial in trials), key=_order)
    return pd.DataFrame(rows).assign(kept=np.arange(len(rows)) < min(keep, len(sound)))


def _row(trial: Trial, best: Trial) -> dict:
    """Return a trial's row of the table, compared with the best of its rung cell by cell."""
    row = {name: getattr(trial, name) for name in ("candidate", "epochs", "batch_size", "mixing", "seconds")}
    row |= {"log_likelihood": trial.value, "difference": math.nan, "difference_se": math.nan}
    if not np.isfinite(trial.value):
        return row | {"place": 2, "reason": f"failed: {trial.error or 'its likelihood is not finite'}"}
    differences = trial.log_likelihood - best.log_likelihood
    behind, error = -float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))
    row |= {"difference": 0.0 - behind, "difference_se": error}
    if trial is best:
        return row | {"place": 0, "reason": "the best likelihood"}
    if behind <= error:
        by = "likelihood" if math.isnan(trial.mixing) else "mixing"
        return row | {"place": 0, "reason": f"within one standard error of {best.candidate}: {by} decides"}
    return row | {
        "place": 1,
        "reason": f"{behind:.2f} nats a cell, {behind / error:.1f} standard errors, below {best.candidate}",
    }


def _order(row: dict) -> tuple[int, float, float]:
    """Return what rows are sorted by: likelihood, but mixing among those that it does not tell apart."""
    mixed = row["mixing"] if row["place"] == 0 and not math.isnan(row["mixing"]) else 0.0
    return row["place"], -mixed, -row["log_likelihood"] if row["place"] < 2 else 0.0
