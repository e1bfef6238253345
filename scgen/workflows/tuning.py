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

from scgen.arguments import MOST_EPOCHS, check_flag, check_seed, check_whole, did_you_mean, shown
from scgen.data.registry import Registry
from scgen.evaluation.scores import mixing
from scgen.models import summary
from scgen.models.scvi import SCVI
from scgen.training.loop import progress_bar
from scgen.training.options import choose_device, default_batch_size, default_epochs

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
    # Totals that are sequencing depth and nothing else: l is the cell's total, as in scvi-tools by default. With size
    # factors, which are observed in any case, it is "nb", and then left out by `tune`.
    "nb-observed": {"gene_likelihood": "nb", "use_observed_lib_size": True},
}


#: A short training has so many steps, in minibatches of so many cells, or more: few passes, and still many steps.
LEAST_STEPS, LEAST_BATCH = 150, 32
#: At most so many validation cells are scored, with so many draws of the latents: more change no standard error.
MAX_SCORED_CELLS, N_SAMPLES = 500, 5
#: Neighbours are looked for among so many cells at most.
MAX_MIXED_CELLS = 5000
#: With fewer cells, there would be fewer than 30 to compare candidates on, and the choice would follow the seed.
LEAST_CELLS = 300
#: What is the end of a candidate, and not that of the others.
FAILURES = FloatingPointError, torch.cuda.OutOfMemoryError
#: The table's.
COLUMNS = [
    *("candidate", "rung", "epochs", "batch_size", "log_likelihood", "difference", "difference_se", "n_scored"),
    *("mixing", "seconds", "kept", "reason"),
]


@dataclass(frozen=True)
class Rung:
    """A round of trainings: their passes, None for the default; their minibatches; at most so many candidates go on."""

    epochs: int | None
    batch_size: int
    keep: int


@dataclass(frozen=True, repr=False)
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
        its standard error "difference_se", over the cells, of which there were "n_scored"; "mixing" of the batches, 1
        where neighbours are as of chance, NaN of one batch; "seconds", of the training and its scores; whether it was
        "kept", and the "reason". The last row is that of ``model``.
    """

    model: SCVI
    best: str
    table: pd.DataFrame

    def _summary(self) -> tuple[str, dict[str, str]]:
        title, rows = self.model._summary()
        tuned = f"Tuning of {self.table['candidate'].nunique()} candidates in {len(self.table)} trainings"
        return tuned, {"best": self.best, "model": title, **rows}

    __repr__, __str__, _repr_html_ = summary.line, summary.text, summary.table


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

    All candidates are trained shortly; where likelihood does not tell the best from others by one standard error, the
    first two of these anew, with twice as many passes over the cells; and the best one in full. A short training is a
    whole one, its learning rate risen and fallen: k passes, in minibatches so small that they make 150 steps and more.
    k is 1 from 5,400 cells on; of fewer cells it is more, up to an eighth of the full training's epochs, and the steps
    may be less. So n candidates take k n epochs, or k (n + 4), and a full training. They are compared on the cells that
    validate, a tenth of each batch, the same for all.

    Parameters
    ----------
    adata
        Cells x genes, with counts, set up by `setup_anndata`. Nothing is written to it.
    presets
        Names out of ``scgen.PRESETS``, or candidates of your own: a mapping of names to arguments of `SCVI`. None
        stands for all presets: "zinb", the default, allows for zeros beyond the negative binomial's; "nb", good for
        counts of molecules, does not; "nb-deep", for many cells of many types, has two layers and 30 latents; "nb-wide"
        256 hidden units, for many genes; "nb-batch" a dispersion for each batch, for several protocols, and is left out
        where there is one batch; "nb-observed" takes the cell's total for the library, as scvi-tools does, and is left
        out where there are size factors.
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
        If ``adata`` was not set up, or with ``counts=False``, has fewer than 300 cells, an argument is out of its
        range, or a candidate is unknown or no setting of `SCVI` for counts.
    FloatingPointError
        If no candidate is left: of each the loss, or the likelihood of the held-out counts, became NaN or infinite, or
        the GPU's memory was too small for it.
    KeyboardInterrupt
        Ctrl-C ends all of it, the full training too.

    Notes
    -----
    Scores are log-likelihoods of a tenth of each cell's counts, given the others, as `SCVI.get_thinned_ll` estimates
    them with 5 draws on 500 of the validation cells at most: they compare across likelihoods and treatments of the
    library, while bounds and marginal likelihoods compare only within one treatment of it. "mixing" is the share of
    other batches among a cell's 15 nearest neighbours, divided by what chance would give. Batches that differ in
    composition cannot, and should not, reach 1; so mixing decides only among candidates whose likelihood is within one
    standard error, of the paired differences by cell, of the best one's.

    The weights kept of a training are those of the best epoch for the validation cells, which makes their scores a
    little too good, those of all candidates alike. For the quality of ``model`` itself, hold out cells of your own.
    Short trainings favour what learns fast: a candidate that needs many steps can lose to one that it would overtake,
    and those that would end within a nat or so of each other are not told apart (``benchmarks/NOTES.md``).
    A candidate whose loss or likelihood is not finite, or that a GPU's memory is too small for, is out, and the table
    says so; if that happens to the chosen one in full, the next of the last round takes its place.

    References
    ----------
    Jamieson and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization, AISTATS 51 (2016)
    240: successive halving.

    Examples
    --------
    >>> import scgen
    >>> adata = scgen.simulate_cells(n_cells=300, n_genes=30, seed=0)
    >>> scgen.setup_anndata(adata, batch_key="batch")
    >>> tuning = scgen.tune(adata, presets=["zinb", "nb", "nb-observed"], max_epochs=3, progress=False)
    >>> tuning.best in scgen.PRESETS, tuning.model.is_trained
    (True, True)
    >>> tuning.table.iloc[[0, -1]][["epochs", "kept"]].values.tolist()
    [[1, True], [3, True]]
    """
    seed, device = check_seed(seed), choose_device(accelerator)
    check_flag("progress", progress)
    if max_epochs is not None:
        max_epochs = check_whole("max_epochs", max_epochs, 1, MOST_EPOCHS)
    check_presets("presets", presets)
    candidates = _candidates(adata, presets)
    *short, full = _rungs(adata.n_obs, device, max_epochs)
    # All are made before any is trained, so that a wrong setting is told at once.
    models = {name: _model(adata, name, arguments, seed) for name, arguments in candidates.items()}

    def made(name: str) -> SCVI:
        return models.pop(name, None) or _model(adata, name, candidates[name], seed)

    names, n_kept, tables = list(candidates), len(candidates), []
    options = {"accelerator": accelerator, "seed": seed}
    with progress_bar(n_kept, "tuning", "training", progress and n_kept > 1) as bar:
        for rung in short:
            if n_kept < 2:
                break
            bar.total = bar.n + n_kept
            trials = []
            for name in names[:n_kept]:
                bar.set_postfix_str(name)
                trials.append(_trial(made(name), name, rung, options | {"early_stopping": False, "progress": False}))
                bar.update()
            tables.append(_ranking(trials, rung.keep).assign(rung=len(tables) + 1))
            names, n_kept = _sound(tables[-1]), int(tables[-1]["kept"].sum())
    trials = []
    for name in names:
        model = made(name)
        trials.append(_trial(model, name, full, options | {"progress": progress}))
        if trials[-1].log_likelihood is not None:
            break
    tables.append(_in_full(trials).assign(rung=len(tables) + 1))
    return Tuning(model, name, pd.concat(tables, ignore_index=True)[COLUMNS])


@dataclass(frozen=True)
class Trial:
    """One training of a candidate, and its score: by held-out cell, (n,); None, and the error, if there is none."""

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

    @property
    def failure(self) -> str:
        """Why there is nothing to compare; empty where there is."""
        return self.error or ("" if math.isfinite(self.value) else "its likelihood is not finite")


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
        is_nb = {"nb-batch": len(registry.batches) < 2, "nb-observed": registry.setup.size_factor_key is not None}
        return {name: arguments for name, arguments in PRESETS.items() if not is_nb.get(name)}
    if not isinstance(presets, Mapping):
        return {name: PRESETS[name] for name in presets}
    return {name: dict(arguments) for name, arguments in presets.items()}


def check_presets(what: str, presets: Sequence[str] | Mapping[str, Mapping] | None) -> None:
    """Raise where a candidate is unknown, or no setting of `SCVI` for counts; ``what`` is the argument's name."""
    if presets is None:
        return
    listed = isinstance(presets, Sequence) and not isinstance(presets, str)
    if not (isinstance(presets, Mapping) or (listed and all(isinstance(name, str) for name in presets))):
        raise TypeError(
            f"{what}={shown(presets)}; it takes a list of names, or a mapping of names to arguments of SCVI."
        )
    if not presets:
        raise ValueError(f"{what} is empty; choose among {', '.join(PRESETS)}, or None for all.")
    if isinstance(presets, Mapping):
        for name, arguments in presets.items():
            _check_arguments(what, name, arguments)
        return
    for name in presets:
        if name not in PRESETS:
            hint = did_you_mean(name, list(PRESETS))
            raise ValueError(f"{what}: {name!r} is unknown; there are {', '.join(PRESETS)}.{hint}")


def _check_arguments(what: str, name: str, arguments: Mapping) -> None:
    """Raise where a candidate has other arguments than those of `SCVI` for counts."""
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise TypeError(f'{what}: {shown(name)}: {shown(arguments)}; write it {{"name": {{"n_latent": 20}}}}.')
    defaults = {key: of.default for key, of in inspect.signature(SCVI).parameters.items() if key != "adata"}
    known = [key for key in defaults if key != "seed"]
    for key in arguments:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ValueError(f'{what}["{name}"]: {key!r} is no setting of SCVI; these are {", ".join(known)}.{hint}')
    try:
        checked = SCVI.Arguments(**defaults | arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f'{what}: candidate "{name}": {error}') from error
    if checked.gene_likelihood == "normal":
        raise ValueError(
            f'{what}["{name}"]: gene_likelihood="normal" is not one of counts, and cannot be compared with those that '
            "are. Leave it out."
        )


def _model(adata: AnnData, name: str, arguments: Mapping, seed: int) -> SCVI:
    """Return an untrained candidate; an error says which one it is of."""
    try:
        return SCVI(adata, seed=seed, **arguments)
    except ValueError as error:
        raise ValueError(f'candidate "{name}": {error}') from error


def _rungs(n_cells: int, device: torch.device, max_epochs: int | None) -> list[Rung]:
    """Return the rounds: as many passes as `LEAST_STEPS` take, then twice as many, then the full training."""
    n_training = round(0.9 * n_cells)
    full = default_batch_size(n_training, device)
    most = max_epochs or default_epochs(math.ceil(n_training / full))
    epochs = max(min(math.ceil(LEAST_STEPS * LEAST_BATCH / n_training), most // 8), 1)

    def rung(epochs: int, keep: int) -> Rung:
        return Rung(epochs, min(max(epochs * n_training // LEAST_STEPS, LEAST_BATCH), full), keep)

    short = [rung(epochs, keep=2), rung(2 * epochs, keep=1)] if 2 * epochs < most else [rung(epochs, keep=1)]
    return [*short, Rung(max_epochs, full, keep=1)]


def _trial(model: SCVI, name: str, rung: Rung, options: Mapping) -> Trial:
    """Train a candidate for a rung, and score it; raise if the training was interrupted."""
    started = time.perf_counter()
    values, mixed, error = None, math.nan, ""
    try:
        model.train(rung.epochs, batch_size=rung.batch_size, **options)
        if not model.trainings[-1]["finished"]:
            raise KeyboardInterrupt  # which `train` takes as the wish for an early end
        values, mixed = _scored(model, options["seed"])
    except FAILURES as failure:
        error = str(failure)
    return Trial(name, len(model.history), rung.batch_size, time.perf_counter() - started, values, mixed, error)


def _scored(model: SCVI, seed: int) -> tuple[np.ndarray, float]:
    """Return how likely held-out counts are, by cell, and how well batches mix."""
    held_out = _some(model.validation_indices, MAX_SCORED_CELLS, seed)
    values = model.get_thinned_ll(indices=held_out, n_samples=N_SAMPLES, return_mean=False, seed=seed)
    if len(model.registry.batches) < 2:
        return values, math.nan
    rows = _some(np.arange(model.adata.n_obs), MAX_MIXED_CELLS, seed)
    batch = model.adata.obs[model.registry.setup.batch_key].astype(str).to_numpy()[rows]
    return values, mixing(model.get_latent_representation(indices=rows), batch)


def _some(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return the rows, or so many of them at random, the same for the same seed."""
    return np.sort(np.random.default_rng(seed).permutation(rows)[:most])


def _ranking(trials: Sequence[Trial], keep: int) -> pd.DataFrame:
    """Return a row for each trial, the better first, and whether it is one of those that are kept.

    Those within one standard error of the best likelihood come first, by their mixing; then the others by likelihood.
    Only the former are kept.
    """
    sound = sorted((trial for trial in trials if not trial.failure), key=lambda trial: -trial.value)
    if not sound:
        raise _none_left(trials)
    failed = [trial for trial in trials if trial.failure]
    rows = pd.DataFrame([_row(trial, sound[0]) for trial in [*sound, *failed]])
    level = rows["difference"] >= -rows["difference_se"]
    order = np.lexsort([-rows["mixing"].fillna(0) * level, ~level])  # stable: else by likelihood, and the failed last
    return rows.iloc[order].assign(kept=np.arange(len(rows)) < min(keep, level.sum()))


def _sound(table: pd.DataFrame) -> list[str]:
    """Return the candidates that did not fail, the better first."""
    return table.loc[table["difference"].notna(), "candidate"].tolist()


def _in_full(trials: Sequence[Trial]) -> pd.DataFrame:
    """Return a row for each full training that was tried, of which the last one went well."""
    if trials[-1].log_likelihood is None:
        raise _none_left(trials)
    *failed, last = trials
    reason = f"trained in full; {last.failure}" if last.failure else "trained in full"
    rows = [*(_row(trial, last) for trial in failed), _row(last, last) | {"reason": reason}]
    return pd.DataFrame(rows).assign(kept=[trial is last for trial in trials])


def _none_left(trials: Sequence[Trial]) -> FloatingPointError:
    """Return the error that says why each candidate failed."""
    causes = "; ".join(f'"{trial.candidate}": {trial.failure}' for trial in trials)
    return FloatingPointError(f"no candidate could be trained; {causes}")


def _row(trial: Trial, best: Trial) -> dict:
    """Return a trial's row of the table, compared with the best of its rung cell by cell."""
    row = {name: getattr(trial, name) for name in ("candidate", "epochs", "batch_size", "mixing", "seconds")}
    n_scored = 0 if trial.log_likelihood is None else len(trial.log_likelihood)
    row |= {"log_likelihood": trial.value, "difference": math.nan, "difference_se": math.nan, "n_scored": n_scored}
    if trial.failure:
        return row | {"reason": f"failed: {trial.failure}"}
    differences = trial.log_likelihood - best.log_likelihood
    difference, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(n_scored))
    if trial is best:
        reason = "the best likelihood"
    elif difference >= -error:
        by = "likelihood" if math.isnan(trial.mixing) else "mixing"
        reason = f"within one standard error of {best.candidate}: {by} decides"
    else:
        reason = f"{-difference:.2f} nats a cell, {-difference / error:.1f} standard errors, below {best.candidate}"
    return row | {"difference": difference, "difference_se": error, "reason": reason}
