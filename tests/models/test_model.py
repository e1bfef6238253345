"""What a trained model answers, and what training guarantees."""

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse, stats

import scgen
from scgen.analysis import inference
from scgen.data.stores import MemoryStore
from scgen.distributions import CellCounts
from scgen.kernels import dispatch
from scgen.models.scvi import CHOICES
from scgen.seeding import seeded
from scgen.training import loop, monitoring, optimizer


def new_model(adata, **arguments):
    scgen.setup_anndata(adata, batch_key="batch")
    return scgen.SCVI(adata, **arguments)


def train(model, max_epochs=2, **options):
    model.train(max_epochs, progress=False, **options)
    return model


@pytest.fixture
def small():
    return scgen.simulate_cells(n_cells=120, n_genes=20, n_batches=2, seed=3)


def test_the_bound_is_the_sum_of_its_parts(small):
    model = train(new_model(small, prior="normal"))
    error, elbo = model.get_reconstruction_error(return_mean=False), model.get_elbo(return_mean=False)
    mean, variance = (a.astype(float) for a in model.get_latent_representation(return_dist=True))
    kl_z = 0.5 * (mean**2 + variance - np.log(variance) - 1).sum(1)
    q = inference.latent(model.vae, model._loader(None, None, 50), "library")
    q_mean, q_variance = (values[:, 0].astype(float) for values in q)
    np.testing.assert_allclose(model.get_latent_library_size()[:, 0], np.exp(q_mean + q_variance / 2), rtol=1e-4)
    # The prior: mean and variance of the batch's training cells' log totals, shrunk to those of all.
    log_l = np.log(np.asarray(small.X.sum(1), float).ravel())
    trained = np.isin(np.arange(120), model.train_indices)
    code, pool = small.obs["batch"].cat.codes.to_numpy(), log_l[trained]
    own = [log_l[trained & (code == b)] for b in (0, 1)]
    m_b = np.array([(len(o) * o.mean() + 10 * pool.mean()) / (len(o) + 10) for o in own])[code]
    v_b = np.array([(len(o) * o.var() + 10 * pool.var()) / (len(o) + 10) for o in own])[code]
    kl_l = 0.5 * (np.log(v_b / q_variance) + (q_variance + (q_mean - m_b) ** 2) / v_b - 1)
    np.testing.assert_allclose(-elbo, error + kl_z + kl_l, rtol=1e-3)
    assert model.get_elbo() == pytest.approx(elbo.mean(), rel=1e-6)
    # Another batch is another prior.
    swapped = small.copy()
    swapped.obs["batch"] = small.obs["batch"].cat.rename_categories({"batch_1": "batch_2", "batch_2": "batch_1"})
    assert not np.allclose(model.get_elbo(swapped, return_mean=False), elbo)


def test_truth_is_recovered():
    adata = scgen.simulate_cells(2000, 100, n_batches=2, mean_library=1000, batch_effect=0.7, seed=0)
    model = train(new_model(adata), None)
    theta = model.vae.decoder.dispersion.log_theta.detach().numpy()
    assert np.corrcoef(theta, adata.var["log_theta"])[0, 1] >= 0.8
    rho = model.get_normalized_expression(n_samples=10, return_numpy=True)
    assert np.corrcoef(rho.ravel(), adata.layers["true_scale"].ravel())[0, 1] >= 0.9
    log_l = np.log(model.get_latent_library_size()[:, 0])
    assert np.corrcoef(log_l, adata.obs["log_library"])[0, 1] >= 0.95
    assert model.history["kl_library_validation"].iloc[-1] > 0

    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    def mixing(x):
        """Entropy of the batches among 50 neighbours, as a share of that of the whole."""
        code = adata.obs["batch"].cat.codes.to_numpy()
        p = code[NearestNeighbors(n_neighbors=51).fit(x).kneighbors(x)[1][:, 1:]].mean(1).clip(1e-9, 1 - 1e-9)
        return -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()

    x = adata.X.toarray()
    pca = PCA(10, random_state=0).fit_transform(np.log1p(x / x.sum(1, keepdims=True) * 1e4))
    assert mixing(model.get_latent_representation()) >= 0.9 * np.log(2)
    assert mixing(pca) < 0.8 * mixing(model.get_latent_representation())


def test_four_hops_to_the_mathematics(small, monkeypatch):
    stacks = []
    original = CellCounts.log_prob

    def spy(self, value):
        stacks.append(traceback.extract_stack())
        return original(self, value)

    monkeypatch.setattr(CellCounts, "log_prob", spy)
    train(new_model(small), 1)
    package = Path(scgen.__file__).parent
    ours = [f for f in stacks[0] if package in Path(f.filename).parents]
    places = [f"{Path(f.filename).relative_to(package)}:{f.name}" for f in ours]
    assert places == ["models/base.py:train", "training/loop.py:fit", "modules/vae.py:forward"]  # and log_prob itself


def test_same_seed_same_bits_and_global_generators_untouched(small):
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002  the global generator is what is watched
    before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    one, two, other = (train(new_model(small, seed=s), seed=s).get_latent_representation() for s in (0, 0, 1))
    assert np.array_equal(one, two)
    assert not np.allclose(one, other)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_the_kl_weight_gets_to_one(small):
    for epochs in (1, 3, 7):
        for start in (0.0, 1.0, 4.0):
            assert train(new_model(small), epochs, kl_start=start).history["kl_weight"].iloc[-1] == 1.0


def test_training_goes_on(small):
    model = train(new_model(small), 3)
    split = model.train_indices
    elbo = model.get_elbo()
    train(model, 20)
    assert model.history.index.tolist() == list(range(1, len(model.history) + 1))
    assert len(model.history) > 3
    assert model.train_indices is split
    assert model.get_elbo() > elbo


#: Everything that takes a seed.
SEEDED = {
    "simulate": lambda model, seed: scgen.simulate_cells(20, 5, seed=seed).X.toarray(),
    "SCVI": lambda model, seed: scgen.SCVI(model.adata, seed=seed).vae.decoder.scale.weight.detach().numpy(),
    "train": lambda model, seed: train(scgen.SCVI(model.adata), 1, seed=seed).get_latent_representation(),
    "latent": lambda model, seed: model.get_latent_representation(give_mean=False, seed=seed),
    "elbo": lambda model, seed: model.get_elbo(return_mean=False, seed=seed),
    "marginal": lambda model, seed: model.get_marginal_ll(n_mc_samples=2, return_mean=False, seed=seed),
    "expression": lambda model, seed: model.get_normalized_expression(return_numpy=True, seed=seed),
    "correlation": lambda model, seed: model.get_feature_correlation_matrix(seed=seed).to_numpy(),
    "parameters": lambda model, seed: model.get_likelihood_parameters(seed=seed)["mean"],
    "differences": lambda model, seed: model.differential_expression("cell_type", seed=seed)["lfc_mean"].to_numpy(),
    "posterior": lambda model, seed: model.posterior_predictive_sample(seed=seed).toarray(),
    "prior": lambda model, seed: model.sample_prior(20, seed=seed).X.toarray(),
    "check": lambda model, seed: scgen.posterior_predictive_check(model, n_samples=2, seed=seed).genes.to_numpy(),
    "typicality": lambda model, seed: model.query(model.adata.copy()).typicality(seed=seed).to_numpy(float),
}


@pytest.mark.parametrize("what", SEEDED)
def test_a_seed_is_a_whole_number(trained, what):
    for seed in (None, 1.7, -1, True, "0"):
        with pytest.raises((TypeError, ValueError), match=f"seed={seed!r}; it takes a whole number from 0"):
            SEEDED[what](trained, seed)
    one, same, other = (SEEDED[what](trained, seed) for seed in (3, np.uint8(3), 4))
    assert np.array_equal(one, same)
    if what != "typicality":  # which of the cells are halved by the seed is no matter in so few
        assert not np.array_equal(one, other)


@pytest.mark.parametrize("number", [True, np.True_, 2.0, 0])
def test_a_number_of_draws_is_a_whole_one(trained, number):
    with pytest.raises((TypeError, ValueError), match=r"n_samples=.*; it takes a whole number from 1"):
        trained.get_normalized_expression(n_samples=number)


def test_split_and_history(small):
    model = train(new_model(small))
    both = np.concatenate([model.train_indices, model.validation_indices])
    assert np.array_equal(np.sort(both), np.arange(120))
    assert len(model.train_indices) == 108
    assert {"elbo_train", "elbo_validation", "kl_z_validation"} <= set(model.history.columns)
    whole = train(new_model(small), train_size=1.0)
    assert len(whole.validation_indices) == 0
    assert "elbo_validation" not in whole.history


def test_early_stopping_keeps_no_weights_of_the_first_half():
    module = torch.nn.Linear(1, 1)
    best = monitoring.Best(module, first_epoch=5, patience=2)
    stopped = None
    # The best value of all comes early; of the second half, epoch 6 is best.
    for epoch, value in enumerate([9.0, 8, 7, 6, 5, 1, 3, 2, 1, 0]):
        with torch.no_grad():
            module.weight.fill_(epoch)
        if best.stop_after(epoch, value):
            stopped = epoch
            break
    best.restore()
    assert (stopped, module.weight.item()) == (8, 6)


def test_trainings_tell_which_weights_were_kept(small, tmp_path, monkeypatch):
    model, original = new_model(small), monitoring.Best.stop_after
    values, ends = iter([5.0, 9, 1, 3, 2, 2, 9, 9, 1, 2]), []

    def told(self, epoch, value):
        ends.append(copy.deepcopy(self.vae.state_dict()))
        return original(self, epoch, next(values))

    monkeypatch.setattr(monitoring.Best, "stop_after", told)
    # Of the second halves, the fourth epoch of six and the last one of four are best.
    for n_epochs, first, kept in ((6, 1, 4), (4, 7, 10)):
        train(model, n_epochs, early_stopping=False)
        assert (model.trainings[-1]["first_epoch"], model.trainings[-1]["kept_epoch"]) == (first, kept)
        now = model.vae.state_dict()
        same = [all(torch.equal(now[name], end[name]) for name in now) for end in ends]
        assert np.flatnonzero(same).tolist() == [kept - 1]
    # Nothing is compared where there are no validation cells, or where an error comes first: the last weights are kept.
    monkeypatch.undo()
    whole = train(new_model(small), 3, train_size=1.0)
    assert whole.trainings[-1]["kept_epoch"] == 3
    monkeypatch.setattr(loop, "evaluate", failing_at(loop.evaluate, 3))
    with pytest.raises(FloatingPointError):
        train(model, 20)
    assert (model.trainings[-1]["first_epoch"], model.trainings[-1]["kept_epoch"]) == (11, 12)
    model.save(tmp_path / "model")
    assert scgen.SCVI.load(tmp_path / "model", small).trainings == model.trainings


def failing_at(evaluate, number):
    """Return the function, which raises when it is called for the n-th time."""
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            raise monitoring.NonFiniteLoss(np.array([0]), np.array([0]), 1, 1)
        return evaluate(*arguments)

    return failing


@pytest.mark.parametrize("n_cells", [2, 3, 5, 17, 33])
def test_no_number_of_cells_breaks_batch_normalisation(n_cells):
    adata = scgen.simulate_cells(n_cells=n_cells, n_genes=10, n_batches=1, seed=0)
    model = train(new_model(adata), batch_size=4)
    assert np.isfinite(model.get_latent_representation()).all()


def test_one_cell_is_refused():
    with pytest.raises(ValueError, match="adata has 1 cell; training needs 2 or more"):
        train(new_model(scgen.simulate_cells(n_cells=1, n_genes=10, n_batches=1)))


def test_odd_cells_and_genes(small):
    x = small.X.toarray()
    x[:, 4] = 0  # a gene that nobody expresses
    small.X = sparse.csr_matrix(x)
    small.obs["batch"] = ["lonely"] + ["rest"] * 119  # a batch of one cell
    with pytest.warns(UserWarning, match="lonely: 1"):
        model = new_model(small)
    train(model)
    assert np.isfinite(model.get_elbo(return_mean=False)).all()
    assert model.get_normalized_expression(gene_list=["gene_5"]).shape == (120, 1)
    new = small[:10].copy()
    new.obs["batch"] = "elsewhere"
    with pytest.raises(ValueError, match=r"elsewhere.*lonely, rest"):
        model.get_latent_representation(new)


def test_a_value_that_is_not_finite_is_named_and_good_weights_kept(small, monkeypatch):
    model = train(new_model(small))
    good = {name: tensor.clone() for name, tensor in model.vae.state_dict().items()}
    row = model.train_indices[7]
    # A value that is damaged after all checks, as by a failing disk.
    monkeypatch.setattr(MemoryStore, "rows", damaged(MemoryStore.rows, row, 5))
    with pytest.raises(FloatingPointError, match=rf"Cells: cell_{row + 1}; genes: gene_6\."):
        train(model, 3)
    assert all(torch.equal(good[name], tensor) for name, tensor in model.vae.state_dict().items())
    monkeypatch.undo()
    assert len(model.history) == 2
    assert np.isfinite(model.get_elbo())


def damaged(rows, row, column):
    def read(self, index, as_sparse=False):
        values = rows(self, index, as_sparse).to_dense()
        values[np.asarray(index) == row, column] = np.nan
        return values.to_sparse_csr() if as_sparse else values

    return read


def test_cells_that_have_changed_are_refused(small):
    model = train(new_model(small))
    before = model.get_latent_representation()
    counts = small.X.copy()
    small.X = np.log1p(small.X.toarray())
    for ask in (model.get_latent_representation, model.get_elbo, lambda: train(model)):
        with pytest.raises(ValueError, match="has changed since"):
            ask()
    small.X = counts
    assert np.array_equal(model.get_latent_representation(), before)
    small.obs["batch"] = small.obs["batch"].to_numpy()[::-1]
    with pytest.raises(ValueError, match="has changed since"):
        model.get_latent_representation()


def test_normal_likelihood_starts_at_the_values(small):
    # On values set up as counts, too: they are not divided by a library that the model does not have.
    model = train(new_model(small, gene_likelihood="normal"), 100)
    x = small.X.toarray()
    # About as good as a Gaussian for each gene by itself; divided by a library, it was 1e8 nats off.
    assert model.get_elbo() > stats.norm(x.mean(0), x.std(0)).logpdf(x).sum(1).mean() - 5


def test_a_first_training_interrupted_at_once_leaves_an_untrained_model(small, monkeypatch):
    model = new_model(small)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("scgen.models.loaders.start_from_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model)
    assert not model.is_trained
    monkeypatch.undo()
    train(model)
    assert model.vae.priors["library"].mean.min() > 1  # started from the data after all


def test_an_interrupt_keeps_what_was_learned(small, caplog):
    model = new_model(small)
    calls = []
    original = monitoring.Best.stop_after

    def interrupting(self, epoch, value):
        calls.append(epoch)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, epoch, value)

    monitoring.Best.stop_after = interrupting
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    try:
        train(model, 50)
    finally:
        monitoring.Best.stop_after = original
        signal.signal(signal.SIGINT, before)
    assert 3 <= len(model.history) <= 5
    assert "interrupted" in caplog.text
    assert model.trainings[-1]["finished"] is False
    assert train(new_model(small), 2).trainings[-1]["finished"] is True
    assert np.isfinite(model.get_latent_representation()).all()


def weights_of(model):
    return {name: weight.clone() for name, weight in model.vae.state_dict().items()}


def assert_same_weights(model, weights):
    for name, weight in model.vae.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_on_epoch_is_told_each_row_of_the_history(small):
    told = []
    model = train(new_model(small), 3, on_epoch=told.append)
    train(model, 2, on_epoch=told.append)
    assert told == [{"epoch": epoch, **row} for epoch, row in enumerate(model.history.to_dict("records"), start=1)]
    assert {type(value) for row in told for name, value in row.items() if name != "epoch"} == {float}
    assert json.loads(json.dumps(model.trainings)) == model.trainings
    assert "on_epoch" not in model.trainings[0]


def test_on_epoch_may_ask_the_model(small):
    model, alone, asked = new_model(small), train(new_model(small), 4), []
    train(model, 4, on_epoch=lambda row: asked.append((model.get_elbo(), model.get_latent_representation(indices=[3]))))
    assert_same_weights(model, weights_of(alone))
    elbos, embeddings = zip(*asked, strict=True)
    assert len(set(elbos)) == 4
    best = model.history["elbo_validation"].loc[3:].idxmax() - 1  # of the second half of the epochs, which is kept
    assert elbos[best] == model.get_elbo()
    assert np.array_equal(embeddings[best], model.get_latent_representation(indices=[3]))


def test_on_epoch_may_save_the_model(small, tmp_path):
    model, seen = new_model(small), []

    def checkpoint(row):
        model.save(tmp_path, overwrite=True)
        seen.append(weights_of(model))
        return row["epoch"] == 2

    train(model, 8, on_epoch=checkpoint)
    loaded = scgen.SCVI.load(tmp_path, small)
    assert_same_weights(loaded, seen[-1])
    assert np.isfinite(loaded.get_elbo())


@pytest.mark.parametrize("last", [2, 7])
def test_on_epoch_stops_where_it_returns_true(small, last):
    model, seen = new_model(small), {}

    def stop(row):
        seen[row["epoch"]] = weights_of(model)
        return np.bool_(row["epoch"] == last)

    train(model, 10, on_epoch=stop)
    assert model.history.index.tolist() == list(range(1, last + 1))
    assert model.trainings[0]["finished"]
    bounds = model.history["elbo_validation"]
    # Weights are compared in the second half of the planned epochs.
    assert_same_weights(model, seen[last if last < 6 else bounds.loc[6:].idxmax()])
    assert not model.vae.training


def test_on_epoch_goes_on_where_it_returns_anything_else(small):
    for answer in (1, "stop", [1], np.ones(2), False, np.False_, None):
        assert len(train(new_model(small), 2, on_epoch=lambda row, answer=answer: answer).history) == 2


def test_an_error_of_on_epoch_is_raised_and_keeps_the_weights_of_its_epoch(small):
    model, seen = new_model(small), []

    def fail(row):
        seen.append(weights_of(model))
        if row["epoch"] == 3:
            return weights_of(lr=row)  # in the words of Python's error for a wrong argument of train
        return None

    with pytest.raises(TypeError, match=r"^weights_of\(\) got an unexpected keyword argument 'lr'$"):
        train(model, 8, on_epoch=fail)
    assert len(model.history) == 3
    assert not model.trainings[0]["finished"]
    assert_same_weights(model, seen[2])
    assert not model.vae.training
    train(model, 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_half_an_epoch_leaves_no_trace(small, monkeypatch, error):
    model = train(new_model(small), 5)
    answers = model.get_latent_representation(), model.history.copy(), list(model.trainings)
    steps = []
    original = optimizer.Adam.step

    def failing(self, *args):
        steps.append(self)
        if len(steps) == 3:
            raise error  # between backward, which left gradients, and the step
        original(self, *args)

    for trained in (model, fresh := new_model(small, seed=4)):
        steps.clear()
        monkeypatch.setattr(optimizer.Adam, "step", failing)
        with pytest.raises(error):
            train(trained, 5, batch_size=20)
        monkeypatch.undo()
    assert np.array_equal(model.get_latent_representation(), answers[0])
    assert model.history.equals(answers[1])
    assert model.trainings == answers[2]
    # A model whose first training failed is as new: the split, too, is still to be chosen.
    assert not fresh.is_trained
    again = train(fresh, train_size=0.5).get_latent_representation()
    assert np.array_equal(again, train(new_model(small, seed=4), train_size=0.5).get_latent_representation())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"train_size": 0.0}, "train_size"),
        ({"train_size": 1.2}, "train_size"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"kl_start": -1.0}, "kl_start"),
        ({"precision": "16"}, '"bf16"'),
        ({"devices": 2}, "devices=2"),
        ({"accelerator": "mps"}, "float64"),
        ({"accelerator": "tpu"}, '"auto", "cpu"'),
        ({"patience": 0}, "patience"),
    ],
)
def test_wrong_training_options(small, options, words):
    with pytest.raises(ValueError, match=words):
        new_model(small).train(**{"max_epochs": 1, "progress": False} | options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n_latent": 0}, "n_latent=0"),
        ({"n_hidden": 1.5}, "n_hidden=1.5"),
        ({"n_layers": -1}, "n_layers=-1"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
        ({"gene_likelihood": "negative_binomial"}, '"zinb", "nb", "poisson" or "normal"'),
        ({"dispersion": "cell"}, "gene-batch"),
        ({"dispersion": "gene-label"}, "labels_key"),
    ],
)
def test_wrong_arguments(small, arguments, words):
    with pytest.raises(ValueError, match=words):
        new_model(small, **arguments)


def test_not_set_up(small):
    with pytest.raises(ValueError, match=r"scgen\.setup_anndata"):
        scgen.SCVI(small)


def test_untrained_models_say_so(small):
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        new_model(small).get_latent_representation()


#: Every model, with compiled kernels. The plain ones only know whether all cells have the same dispersions, and have no
#: part in normal models.
COMPILED = [(*pair, "compiled") for pair in itertools.product(CHOICES["gene_likelihood"], CHOICES["dispersion"])]
PLAIN = [
    *(("zinb", "gene", "plain"), ("zinb", "gene-batch", "plain")),
    *(("nb", "gene", "plain"), ("nb", "gene-cell", "plain")),
    ("poisson", "gene", "plain"),
]


@pytest.mark.parametrize(("likelihood", "dispersion", "kernels"), COMPILED + PLAIN)
def test_every_model_answers_everything(small, monkeypatch, likelihood, dispersion, kernels):
    monkeypatch.setattr(dispatch, "SMALLEST", {"compiled": 0, "plain": 2**14}[kernels])
    small.obs["donor"] = np.resize(["a", "b", "c"], 120)
    small.obs["age"] = np.linspace(20, 60, 120)
    scgen.setup_anndata(
        small,
        batch_key="batch",
        labels_key="cell_type",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
    )
    model = train(scgen.SCVI(small, gene_likelihood=likelihood, dispersion=dispersion, n_layers=2, n_latent=3))
    assert model.get_latent_representation().shape == (120, 3)
    assert np.isfinite(model.get_elbo())
    # In expectation the bound rises with the draws; over 120 cells the noise is far smaller than the rise.
    few, many = (model.get_marginal_ll(n_mc_samples=n) for n in (1, 40))
    assert few < many
    drawn = model.posterior_predictive_sample()
    assert drawn.shape == (120, 20)
    sampled = model.sample_prior(50, batch="batch_2")
    assert sampled.shape == (50, 20)
    assert set(sampled.obs["batch"]) == {"batch_2"}
    expression = model.get_normalized_expression(batch=["batch_1", "batch_2"], n_samples=3)
    assert expression.shape == (120, 20)
    if likelihood != "normal":
        np.testing.assert_allclose(expression.sum(axis=1), 1, rtol=1e-4)
        assert (drawn.data == drawn.data.round()).all()
        assert model.get_latent_library_size().shape == (120, 1)
    else:
        with pytest.raises(ValueError, match="no library"):
            model.get_latent_library_size()


def test_compiled_and_plain_kernels_agree(small, monkeypatch):
    answers = []
    for smallest in (0, 2**14):
        monkeypatch.setattr(dispatch, "SMALLEST", smallest)
        model = train(new_model(small), 5)
        answers.append((model.get_latent_representation(), model.get_elbo()))
    np.testing.assert_allclose(answers[0][0], answers[1][0], atol=1e-3)
    assert answers[0][1] == pytest.approx(answers[1][1], rel=1e-5)


@pytest.mark.parametrize("at_once", [7, 30])
def test_marginal_likelihood_is_the_mean_weight(small, monkeypatch, at_once):
    model = train(new_model(small))
    loader = model._loader(None, None, 120)
    monkeypatch.setattr(inference, "AT_ONCE", at_once)
    estimate, _ = inference.marginal(model.vae, loader, 30, seed=0)
    with seeded(0), torch.inference_mode():
        (cells,) = loader
        chunks = [
            model.vae.log_weights(cells, model.vae.infer(cells), (min(at_once, 30 - start),))
            for start in range(0, 30, at_once)
        ]
    weights = torch.cat(chunks).double()
    assert len(weights) == 30
    np.testing.assert_allclose(estimate, weights.exp().mean(0).log(), rtol=1e-6)


def test_bfloat16_where_layers_are_wide(small):
    adata = scgen.simulate_cells(n_cells=300, n_genes=600, n_batches=2, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    for seed in range(3):
        elbos = {}
        for precision in ("32", "bf16"):
            model = scgen.SCVI(adata, seed=seed)
            # On all cells, to the end: which epoch 30 cells find best is a matter of chance, and of every rounding.
            model.train(40, batch_size=64, train_size=1, precision=precision, progress=False, seed=seed)
            elbos[precision] = model.get_elbo()
            assert not any(getattr(part, "reduced", False) for part in model.vae.modules())
            assert model.trainings[-1]["precision"] == precision
        assert elbos["bf16"] != elbos["32"]
        assert elbos["bf16"] == pytest.approx(elbos["32"], rel=1e-3)


def test_an_embedding_is_the_means_of_the_posterior(small):
    model = train(new_model(small))
    mean, variance = model.get_latent_representation(return_dist=True)
    assert np.array_equal(model.get_latent_representation(), mean)
    draws = model.get_latent_representation(give_mean=False)
    assert np.abs((draws - mean) / np.sqrt(variance)).mean() == pytest.approx(np.sqrt(2 / np.pi), rel=0.1)
    (cells,) = model._loader(None, None, 1000)
    for posterior in model.vae.posteriors.values():
        assert torch.equal(posterior.means(cells), posterior(cells).mean)


def test_rows_come_in_the_order_asked_for(small, tmp_path):
    model = train(new_model(small))
    order = np.random.default_rng(0).permutation(120)[:50]
    whole = model.get_latent_representation()
    np.testing.assert_allclose(model.get_latent_representation(indices=order), whole[order], atol=1e-5)
    np.testing.assert_allclose(model.get_latent_representation(indices=[-1, 3]), whole[[-1, 3]], atol=1e-5)
    mask = np.zeros(120, bool)
    mask[[5, 9]] = True
    np.testing.assert_allclose(model.get_latent_representation(indices=mask), whole[[5, 9]], atol=1e-5)
    table = model.get_normalized_expression(indices=order)
    assert table.index.tolist() == small.obs_names[order].tolist()
    small.write_h5ad(tmp_path / "cells.h5ad")
    import anndata

    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert np.array_equal(
        model.get_latent_representation(backed, indices=order), model.get_latent_representation(indices=order)
    )
    shuffled = small[:, np.random.default_rng(1).permutation(20)].copy()
    assert np.array_equal(model.get_latent_representation(shuffled), whole)
    with pytest.raises(ValueError, match="120 cells"):
        model.get_latent_representation(indices=[500])
    with pytest.raises(ValueError, match="empty"):
        model.get_latent_representation(indices=[])
    with pytest.raises(ValueError, match=r"3 of the model's 20 genes.*gene_1"):
        model.get_latent_representation(small[:, 3:].copy())


def test_counterfactual_batches(small):
    model = train(new_model(small), 10)
    observed, first, second, both = (
        model.get_normalized_expression(batch=b, return_numpy=True)
        for b in ("observed", "batch_1", "batch_2", ["batch_1", "batch_2"])
    )
    inside = (small.obs["batch"] == "batch_1").to_numpy()
    np.testing.assert_allclose(observed[inside], first[inside], rtol=1e-5)
    assert not np.allclose(observed[~inside], first[~inside], rtol=1e-2)
    np.testing.assert_allclose(both, (first + second) / 2, rtol=1e-4)
    assert model.get_normalized_expression(transform_batch="batch_1").equals(
        model.get_normalized_expression(batch="batch_1")
    )
    np.testing.assert_allclose(model.get_normalized_expression(library_size=1e4).sum(axis=1), 1e4, rtol=1e-4)
    chosen = model.get_normalized_expression(gene_list=["gene_7", "gene_2"])
    assert chosen.columns.tolist() == ["gene_7", "gene_2"]
    draws = model.get_normalized_expression(n_samples=4, return_mean=False)
    assert draws.shape == (4, 120, 20)
    np.testing.assert_allclose(
        draws.mean(0), model.get_normalized_expression(n_samples=4, return_numpy=True), rtol=1e-4
    )
    with pytest.raises(ValueError, match="has one batch"):
        model.posterior_predictive_sample(batch=["batch_1", "batch_2"])
    everything = model.get_normalized_expression()
    assert model.get_normalized_expression(gene_list=small.var_names[[3]]).equals(everything[["gene_4"]])
    for wrong in (
        {"batch": []},
        {"batch": "batch_9"},
        {"gene_list": ["x"]},
        {"library_size": 0},
        {"n_samples": 0},
        {"batch": "a", "transform_batch": "b"},
    ):
        with pytest.raises(ValueError, match=r"batch|genes|library_size|n_samples"):
            model.get_normalized_expression(**wrong)


def test_size_factors_replace_the_library(small):
    total = np.asarray(small.X.sum(1)).ravel()
    small.obs["factor"] = total / np.median(total)  # a unit of its own
    scgen.setup_anndata(small, batch_key="batch", size_factor_key="factor")
    model = train(scgen.SCVI(small), 30)
    np.testing.assert_allclose(model.get_latent_library_size()[:, 0], small.obs["factor"], rtol=1e-5)
    assert (model.history["kl_library_validation"] == 0).all()
    mean = model.get_normalized_expression(return_numpy=True, n_samples=5).mean(0)
    truth = (small.X.toarray() / small.obs["factor"].to_numpy()[:, None]).mean(0)
    assert np.corrcoef(np.log(mean), np.log(truth))[0, 1] > 0.95


def test_samples_look_like_the_data():
    adata = scgen.simulate_cells(1000, 50, n_batches=2, seed=1)
    model = train(new_model(adata), None)
    drawn = model.posterior_predictive_sample()
    x = adata.X.toarray()
    assert np.corrcoef(np.log1p(np.asarray(drawn.mean(0)).ravel()), np.log1p(x.mean(0)))[0, 1] > 0.98
    assert (drawn.toarray() == 0).mean() == pytest.approx((x == 0).mean(), abs=0.03)
    prior = model.sample_prior(4000, batch="batch_1")
    log_l = np.log(prior.obs["library"])
    m, v = (getattr(model.vae.priors["library"], name)[0].item() for name in ("mean", "variance"))
    assert abs(log_l.mean() - m) < 4 * (v / 4000) ** 0.5
    assert log_l.var() == pytest.approx(v, rel=0.1)
    # With zero inflation the expected total is below l.
    assert prior.X.sum(1).mean() < prior.obs["library"].mean()


def test_kill_during_training_leaves_files_alone(tmp_path, start):
    code = f"""
    import scgen
    adata = scgen.simulate_cells(n_cells=300, n_genes=30)
    adata.write_h5ad({str(tmp_path / "in.h5ad")!r})
    scgen.setup_anndata(adata, batch_key="batch")
    model = scgen.SCVI(adata)
    model.train(max_epochs=1, progress=False)
    model.save({str(tmp_path / "model")!r})
    print("saved", flush=True)
    model.train(max_epochs=100000, early_stopping=False, progress=False)
    """
    run = start([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert run.stdout.readline() == "saved\n"
    threading.Event().wait(0.5)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    import anndata

    adata = anndata.read_h5ad(tmp_path / "in.h5ad")
    assert np.isfinite(scgen.SCVI.load(tmp_path / "model", adata).get_elbo())


def test_a_training_within_a_training_is_refused(small):
    model = new_model(small)
    with pytest.raises(RuntimeError, match="cannot be trained again meanwhile"):
        train(model, 3, on_epoch=lambda row: train(model, 1))
    train(model, 2)  # the refusal has left nothing locked
    assert [len(model.trainings), len(model.history)] == [2, 3]


def test_a_model_that_is_saved_in_training_has_its_history(small, tmp_path):
    model = new_model(small)
    train(model, 4, on_epoch=lambda row: row["epoch"] == 3 and model.save(tmp_path / "model"))
    assert len(scgen.SCVI.load(tmp_path / "model").history) == 3
