"""Choose settings by successive halving: train many candidates shortly, few longer, and one in full."""

import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scgen.arguments import MOST_EPOCHS, check_flag, check_seed, check_whole, counted, did_you_mean, shown
from scgen.data.registry import Registry
from scgen.evaluation.scores import mixing
from scgen.models import summary
from scgen.models.scvi import SCVI
from scgen.training.loop import progress_bar
from scgen.training.options import choose_device, default_batch_size, default_epochs

#: Named arguments of `SCVI`, for ``SCVI(adata, **PRESETS["nb"])``.
PRESETS: dict[str, dict] = {
    # The default. For more zeros than the negative binomial has, such as genes that are off in some cells of a state.
    "zinb": {},
    # For counts of molecules (UMI), which seldom have more zeros than the negative binomial, above all low counts.
    "nb": {"gene_likelihood": "nb"},
    # For ten thousand cells or more, of many types: more latent dimensions and deeper networks.
    "nb-deep": {"gene_likelihood": "nb", "n_layers": 2, "n_latent": 30},
    # For many genes and fine differences between states.
    "nb-wide": {"gene_likelihood": "nb", "n_hidden": 256},
    # For batches with different noise, such as several protocols. `tune` leaves it out if there is only one batch.
    "nb-batch": {"gene_likelihood": "nb", "dispersion": "gene-batch"},
    # For totals that reflect only the sequencing depth: l is the cell's total count, as in scvi-tools by default. With
    # size factors, which are observed in any case, it equals "nb", and `tune` leaves it out.
    "nb-observed": {"gene_likelihood": "nb", "use_observed_lib_size": True},
}

#: A short training has at least this many steps, of minibatches of at least this many cells, in few passes.
LEAST_STEPS, LEAST_BATCH = 150, 32
#: Largest number of validation cells to score, and draws of the latents. More would not reduce the standard error.
MAX_SCORED_CELLS, N_SAMPLES = 500, 5
#: Largest number of cells among which neighbours are searched.
MAX_MIXED_CELLS = 5000
#: With fewer cells, fewer than 30 would compare the candidates, and the seed would determine the choice.
LEAST_CELLS = 300
#: Errors that end one candidate; the other candidates go on.
FAILURES = FloatingPointError, torch.cuda.OutOfMemoryError
#: Columns of the table.
COLUMNS = [
    *("candidate", "rung", "epochs", "batch_size", "log_likelihood", "difference", "difference_se", "n_scored"),
    *("mixing", "seconds", "kept", "reason"),
]


@dataclass(frozen=True)
class Rung:
    """A round of trainings: their epochs (None is the default), their batch size and how many candidates to keep."""

    epochs: int | None
    batch_size: int
    keep: int


@dataclass(frozen=True, repr=False)
class Tuning:
    """The result of `tune`: the chosen model, and the table that led to the choice.

    Attributes
    ----------
    model
        The chosen candidate, trained in full.
    best
        The name of the chosen candidate.
    table
        One row per candidate and rung, the best first. "candidate" is its name, "rung" the round, from 1. "epochs" and
        "batch_size" describe the training. "log_likelihood" is that of the held-out counts, in nats per cell.
        "difference" is the difference to the best of the rung, and "difference_se" its standard error over the
        "n_scored" cells. "mixing" of the batches is 1 if neighbours are random, and NaN with one batch. "seconds" is
        the time of training and scoring. "kept" says whether the candidate was kept, and "reason" why. The last row
        is that of ``model``.
    """

    model: SCVI
    best: str
    table: pd.DataFrame

    def _summary(self) -> tuple[str, dict[str, str]]:
        title, rows = self.model._summary()
        candidates = counted(self.table["candidate"].nunique(), "candidate")
        tuned = f"Tuning of {candidates} in {counted(len(self.table), 'training')}"
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
    """Choose the settings of `SCVI` for these cells by successive halving, and train the best model in full.

    First, all candidates are trained shortly. If the likelihoods of the best and others are within one standard error,
    the first two of these are trained again, with twice as many epochs. The best candidate is then trained in full.
    Candidates are compared on the same validation cells, a tenth of each batch.

    A short training has the whole learning-rate schedule in k epochs, with minibatches small enough for at least 150
    steps. k is 1 from 5,400 cells on. With fewer cells it is larger, up to an eighth of the epochs of the full
    training, and there may be fewer steps. In total, n candidates take k n or k (n + 4) epochs and one full training.

    Parameters
    ----------
    adata
        Cells x genes, with counts, set up by `setup_anndata`. Nothing is written to it.
    presets
        Names in ``scgen.PRESETS``, or your own candidates: a mapping of names to arguments of `SCVI`. None uses all
        presets:

        - "zinb", the default, allows for more zeros than the negative binomial;
        - "nb" does not, and suits counts of molecules;
        - "nb-deep" has two layers and 30 latents, for many cells of many types;
        - "nb-wide" has 256 hidden units, for many genes;
        - "nb-batch" has a dispersion for each batch, for several protocols; it is left out if there is one batch;
        - "nb-observed" uses the cell's total count as library size, as scvi-tools does; it is left out if there are
          size factors.
    max_epochs
        Number of epochs of the full training; None uses the default of `SCVI.train`.
    accelerator
        As in `SCVI.train`.
    seed
        Seed of the initial weights, the held-out cells and all noise.
    progress
        Whether to show the candidate that is being trained, and then the progress of the full training.

    Returns
    -------
    A `Tuning` with the model, the name of its settings and a table of all trainings. The model is equal to that of
    ``SCVI(adata, seed=seed, **settings)`` after ``train(max_epochs, accelerator=accelerator, seed=seed)``.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If ``adata`` was not set up, was set up with ``counts=False`` or has fewer than 300 cells, if an argument is out
        of its range, or if a candidate is unknown or not a setting of `SCVI` for counts.
    FloatingPointError
        If every candidate failed: its loss or the likelihood of the held-out counts became NaN or infinite, or it did
        not fit into the GPU's memory.
    KeyboardInterrupt
        After Ctrl-C, which ends all trainings, including the full one.

    Notes
    -----
    Scores are log-likelihoods of a tenth of each cell's counts, given the others. `SCVI.get_thinned_ll` estimates them
    with 5 draws on at most 500 of the validation cells. Unlike bounds and marginal likelihoods, they can also be
    compared between models that treat the library size differently. "mixing" is the share of other batches among a
    cell's 15 nearest neighbours, divided by the share expected by chance. Batches that differ in composition cannot and
    should not reach 1. Mixing therefore decides only among candidates whose likelihood is within one standard error of
    the best one's; the standard error is that of the differences by cell.

    A training keeps the weights of the best epoch for the validation cells. Scores on these cells are therefore a
    little too good, for all candidates alike. To measure the quality of ``model``, hold out other cells. Short
    trainings favour models that learn fast. A candidate that needs many steps can lose although it would win after a
    full training, and candidates that would end within about a nat of each other cannot be distinguished
    (``benchmarks/NOTES.md``). A candidate whose loss or likelihood is not finite, or that does not fit into the GPU's
    memory, is dropped, and the table says so. If this happens in the full training, the next candidate of the last
    round is trained instead.

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
    # All models are made before the first is trained, so that a wrong setting fails at once.
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
    """One training of a candidate, and its log-likelihood by held-out cell, (n,), or None and the error."""

    candidate: str
    epochs: int
    batch_size: int
    seconds: float
    log_likelihood: np.ndarray | None = None
    mixing: float = math.nan
    error: str = ""

    @property
    def value(self) -> float:
        """Mean log-likelihood, in nats per cell."""
        return math.nan if self.log_likelihood is None else float(self.log_likelihood.mean())

    @property
    def failure(self) -> str:
        """Reason why the training has no score; empty if it has one."""
        return self.error or ("" if math.isfinite(self.value) else "its likelihood is not finite")


def _candidates(adata: AnnData, presets: Sequence[str] | Mapping[str, Mapping] | None) -> dict[str, dict]:
    """Return the arguments of each candidate, by name; raise ValueError if the cells cannot be used for tuning."""
    registry = Registry.of(adata, labels=False)
    if not registry.setup.counts:
        raise ValueError(
            "the data were set up with counts=False, but candidates are compared on held-out counts. Set up counts, "
            'setup_anndata(adata, layer="counts"), or train SCVI(adata, gene_likelihood="normal") without tune.'
        )
    if adata.n_obs < LEAST_CELLS:
        raise ValueError(
            f"adata has {counted(adata.n_obs, 'cell')}, but tune needs {LEAST_CELLS}: it compares candidates on a "
            "tenth of them. Train SCVI(adata) with its defaults."
        )
    if presets is None:
        is_nb = {"nb-batch": len(registry.batches) < 2, "nb-observed": registry.setup.size_factor_key is not None}
        return {name: arguments for name, arguments in PRESETS.items() if not is_nb.get(name)}
    if not isinstance(presets, Mapping):
        return {name: PRESETS[name] for name in presets}
    return {name: dict(arguments) for name, arguments in presets.items()}


def check_presets(what: str, presets: Sequence[str] | Mapping[str, Mapping] | None) -> None:
    """Raise an error if a candidate is unknown or not a setting of `SCVI` for counts; ``what`` names the argument."""
    if presets is None:
        return
    listed = isinstance(presets, Sequence) and not isinstance(presets, str)
    if not (isinstance(presets, Mapping) or (listed and all(isinstance(name, str) for name in presets))):
        raise TypeError(
            f"{what}={shown(presets)}; it takes a list of names, or a mapping of names to arguments of SCVI."
        )
    if not presets:
        raise ValueError(f"{what} is empty; choose from {', '.join(PRESETS)}, or None for all.")
    if isinstance(presets, Mapping):
        for name, arguments in presets.items():
            _check_arguments(what, name, arguments)
        return
    for name in presets:
        if name not in PRESETS:
            hint = did_you_mean(name, list(PRESETS))
            raise ValueError(f"{what}: {name!r} is unknown; choose from {', '.join(PRESETS)}.{hint}")


def _check_arguments(what: str, name: str, arguments: Mapping) -> None:
    """Raise an error if a candidate has arguments that `SCVI` does not take for counts."""
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise TypeError(f'{what}: {shown(name)}: {shown(arguments)}; write it {{"name": {{"n_latent": 20}}}}.')
    defaults = {key: of.default for key, of in inspect.signature(SCVI).parameters.items() if key != "adata"}
    known = [key for key in defaults if key != "seed"]
    for key in arguments:
        if key not in known:
            hint = did_you_mean(str(key), known)
            text = f'{what}["{name}"]: {key!r} is not a setting of SCVI; choose from {", ".join(known)}.{hint}'
            raise ValueError(text)
    try:
        checked = SCVI.Arguments(**defaults | arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f'{what}: candidate "{name}": {error}') from error
    if checked.gene_likelihood == "normal":
        raise ValueError(
            f'{what}["{name}"]: gene_likelihood="normal" is not a likelihood of counts and cannot be compared with '
            "those of counts. Leave it out."
        )


def _model(adata: AnnData, name: str, arguments: Mapping, seed: int) -> SCVI:
    """Make a candidate's model, untrained; an error names the candidate."""
    try:
        return SCVI(adata, seed=seed, **arguments)
    except ValueError as error:
        raise ValueError(f'candidate "{name}": {error}') from error


def _rungs(n_cells: int, device: torch.device, max_epochs: int | None) -> list[Rung]:
    """Return the rounds: the epochs that `LEAST_STEPS` take, then twice as many, then the full training."""
    n_training = round(0.9 * n_cells)
    full = default_batch_size(n_training, device)
    most = max_epochs or default_epochs(math.ceil(n_training / full))
    epochs = max(min(math.ceil(LEAST_STEPS * LEAST_BATCH / n_training), most // 8), 1)

    def rung(epochs: int, keep: int) -> Rung:
        return Rung(epochs, min(max(epochs * n_training // LEAST_STEPS, LEAST_BATCH), full), keep)

    short = [rung(epochs, keep=2), rung(2 * epochs, keep=1)] if 2 * epochs < most else [rung(epochs, keep=1)]
    return [*short, Rung(max_epochs, full, keep=1)]


def _trial(model: SCVI, name: str, rung: Rung, options: Mapping) -> Trial:
    """Train a candidate for a rung and score it; raise KeyboardInterrupt if the training was interrupted."""
    started = time.perf_counter()
    values, mixed, error = None, math.nan, ""
    try:
        model.train(rung.epochs, batch_size=rung.batch_size, **options)
        if not model.trainings[-1]["finished"]:
            raise KeyboardInterrupt  # `train` catches it and ends early
        values, mixed = _scored(model, options["seed"])
    except FAILURES as failure:
        error = str(failure)
    return Trial(name, len(model.history), rung.batch_size, time.perf_counter() - started, values, mixed, error)


def _scored(model: SCVI, seed: int) -> tuple[np.ndarray, float]:
    """Return the log-likelihood of held-out counts, by cell, and the mixing of the batches."""
    held_out = _some(model.validation_indices, MAX_SCORED_CELLS, seed)
    values = model.get_thinned_ll(indices=held_out, n_samples=N_SAMPLES, return_mean=False, seed=seed)
    if len(model.registry.batches) < 2:
        return values, math.nan
    rows = _some(np.arange(model.adata.n_obs), MAX_MIXED_CELLS, seed)
    batch = model.adata.obs[model.registry.setup.batch_key].astype(str).to_numpy()[rows]
    return values, mixing(model.get_latent_representation(indices=rows), batch)


def _some(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return all rows, or a random sample of ``most`` of them, which depends only on the seed."""
    return np.sort(np.random.default_rng(seed).permutation(rows)[:most])


def _ranking(trials: Sequence[Trial], keep: int) -> pd.DataFrame:
    """Return a row for each trial, the best first, and whether it is kept.

    Candidates within one standard error of the best likelihood come first, sorted by mixing; only these can be kept.
    The others follow, sorted by likelihood.
    """
    sound = sorted((trial for trial in trials if not trial.failure), key=lambda trial: -trial.value)
    if not sound:
        raise _none_left(trials)
    failed = [trial for trial in trials if trial.failure]
    rows = pd.DataFrame([_row(trial, sound[0]) for trial in [*sound, *failed]])
    level = rows["difference"] >= -rows["difference_se"]
    order = np.lexsort([-rows["mixing"].fillna(0) * level, ~level])  # stable: ties keep their order
    return rows.iloc[order].assign(kept=np.arange(len(rows)) < min(keep, level.sum()))


def _sound(table: pd.DataFrame) -> list[str]:
    """Return the candidates that did not fail, the best first."""
    return table.loc[table["difference"].notna(), "candidate"].tolist()


def _in_full(trials: Sequence[Trial]) -> pd.DataFrame:
    """Return a row for each full training; only the last one succeeded."""
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
    """Return a trial's row of the table. The trial is compared with the best of its rung, cell by cell."""
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
        reason = f"{-difference:.2f} nats per cell ({-difference / error:.1f} standard errors) below {best.candidate}"
    return row | {"difference": difference, "difference_se": error, "reason": reason}
