"""Settings chosen on held-out counts: against simulated truth, brute force, and the same things done by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import scgen
from scgen.evaluation.scores import mixing
from scgen.training import monitoring, options
from scgen.workflows import tuning
from scgen.workflows.tuning import Trial


@pytest.fixture(scope="module")
def cells():
    adata = scgen.simulate_cells(400, 60, n_batches=2, zero_inflation=0, mean_library=500, seed=3)
    scgen.setup_anndata(adata, batch_key="batch", labels_key="cell_type")
    return adata


@pytest.fixture
def few(cells):
    return cells[:300].copy()


#: With a prior that needs no training, because they are compared after three epochs on 400 cells.
OWN = {
    "poisson": {"gene_likelihood": "poisson", "prior": "normal"},
    "nb": {"gene_likelihood": "nb", "prior": "normal"},
    "the same": {"gene_likelihood": "nb", "prior": "normal"},  # so that a second round follows
    "crippled": {"gene_likelihood": "nb", "prior": "normal", "n_latent": 1, "n_hidden": 2},
}


def tuned(adata, presets=None, **options):
    return scgen.tune(adata, presets=presets, accelerator="cpu", progress=False, **options)


@pytest.fixture(scope="module")
def found(cells):
    return tuned(cells, OWN, max_epochs=24, seed=1)


def test_the_truth_wins(found):
    # The counts are negative binomial, of theta down to 0.5, in types that one latent behind two units cannot hold.
    assert found.best in ("nb", "the same")
    for name in ("poisson", "crippled"):
        (row,) = found.table[found.table["candidate"] == name].to_dict("records")
        assert row["rung"] == 1
        assert not row["kept"]
        assert row["difference"] < -2 * row["difference_se"]


def test_what_is_clear_is_not_tried_again(cells):
    table = tuned(cells, {name: OWN[name] for name in ("crippled", "nb", "poisson")}, max_epochs=24, seed=1).table
    assert table["candidate"].iloc[[0, 3]].tolist() == ["nb", "nb"]
    assert table["kept"].tolist() == [True, False, False, True]
    assert table["epochs"].tolist() == [3, 3, 3, 24]


def test_zero_inflation_is_found():
    adata = scgen.simulate_cells(500, 60, n_batches=1, zero_inflation=0.4, mean_library=3000, seed=5)
    scgen.setup_anndata(adata)
    assert tuned(adata, ["nb", "zinb"]).best == "zinb"


def test_the_table(found, cells):
    table = found.table
    assert table.columns.tolist() == [
        *("candidate", "rung", "epochs", "batch_size", "log_likelihood", "difference", "difference_se", "n_scored"),
        *("mixing", "seconds", "kept", "reason"),
    ]
    assert table["rung"].tolist() == [1, 1, 1, 1, 2, 2, 3]
    assert table["kept"].tolist() == [True, True, False, False, True, False, True]
    # Those of a rung are those that the one before kept.
    for rung in (1, 2):
        kept = table[(table["rung"] == rung) & table["kept"]]["candidate"]
        assert set(table[table["rung"] == rung + 1]["candidate"]) == set(kept)
    assert table["candidate"].iloc[-1] == found.best
    # 150 steps of 32 of the 360 cells would be 14 passes, above an eighth of 24: k = 3, and k (4 + 4) + 24 in all.
    assert table["epochs"].tolist() == [3, 3, 3, 3, 6, 6, 24]
    assert table["epochs"].sum() == 3 * (4 + 4) + 24
    assert table["epochs"].iloc[-1] == len(found.model.history)
    assert table["batch_size"].tolist() == [32] * 6 + [found.model.trainings[-1]["batch_size"]]
    assert (table["n_scored"] == 40).all()  # a tenth of 400
    assert (table["seconds"] > 0).all()
    assert table["mixing"].between(0, 1.2).all()


@pytest.mark.parametrize("n_cells", [100, 450, 5334, 6933, 50_000, 1_000_000])
def test_the_sum_of_epochs_is_bounded(n_cells):
    device = torch.device("cpu")
    n_training = round(0.9 * n_cells)
    full = options.default_epochs(-(-n_training // options.default_batch_size(n_training, device)))
    first, second, last = tuning._rungs(n_cells, device, None)
    assert (last.epochs, last.keep) == (None, 1)
    assert (first.keep, second.keep, second.epochs) == (2, 1, 2 * first.epochs)
    assert first.epochs * (6 + 4) <= 10 * full / 8
    n_steps = first.epochs * -(-n_training // first.batch_size)
    assert n_steps >= 150 or first.epochs == full // 8
    # The second has as many steps, or more, of up to twice as many cells.
    assert second.epochs * -(-n_training // second.batch_size) >= n_steps * 0.99
    assert first.batch_size <= second.batch_size <= 2 * first.batch_size + 1
    if n_cells >= 5334:
        assert first.epochs == 1


@pytest.mark.parametrize(
    ("n_cells", "device", "short", "full"),
    [
        (400, "cpu", [(6, 32), (12, 32)], 64),
        (6933, "cpu", [(1, 41), (2, 83)], 512),
        (50_000, "cpu", [(1, 300), (2, 512)], 512),
        (50_000, "cuda", [(1, 300), (2, 600)], 2812),
        (1_000_000, "cpu", [(1, 512), (2, 512)], 512),
        (1_000_000, "cuda", [(1, 4096), (2, 4096)], 4096),
    ],
)
def test_minibatches_leave_150_steps_and_are_no_larger_than_in_full(n_cells, device, short, full):
    *found, last = tuning._rungs(n_cells, torch.device(device), None)
    assert [(rung.epochs, rung.batch_size) for rung in found] == short
    assert last.batch_size == full


@pytest.mark.parametrize(("max_epochs", "epochs"), [(1, [1]), (2, [1]), (3, [1, 2]), (17, [2, 4])])
def test_no_round_is_longer_than_the_full_training(max_epochs, epochs):
    *short, last = tuning._rungs(400, torch.device("cpu"), max_epochs)
    assert [rung.epochs for rung in short] == epochs
    assert short[-1].keep == 1
    assert last.epochs == max_epochs


def test_the_same_seed_gives_the_same(cells, found):
    again = tuned(cells, OWN, max_epochs=24, seed=1)
    pd.testing.assert_frame_equal(again.table.drop(columns="seconds"), found.table.drop(columns="seconds"))
    other = tuned(cells, OWN, max_epochs=24, seed=2)
    assert other.best in ("nb", "the same")
    assert (other.table["log_likelihood"] != found.table["log_likelihood"]).all()


def test_the_model_is_the_one_trained_alone(cells, found):
    alone = scgen.SCVI(cells, seed=1, **OWN[found.best])
    alone.train(24, accelerator="cpu", seed=1, progress=False)
    assert np.array_equal(found.model.get_latent_representation(), alone.get_latent_representation())
    ours, theirs = found.model.vae.state_dict(), alone.vae.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert found.model.history.drop(columns="seconds").equals(alone.history.drop(columns="seconds"))
    assert [dict(one, progress=None) for one in found.model.trainings] == [
        dict(one, progress=None) for one in alone.trainings
    ]


def test_scores_are_those_asked_by_hand(cells, found):
    by_hand = {}
    for name, arguments in OWN.items():
        model = scgen.SCVI(cells, seed=1, **arguments)
        model.train(3, batch_size=32, accelerator="cpu", early_stopping=False, seed=1, progress=False)
        # The cells that are held out are the same for all, and those that the chosen model was not trained on either.
        assert np.array_equal(model.validation_indices, found.model.validation_indices)
        by_hand[name] = (
            model.get_thinned_ll(indices=model.validation_indices, n_samples=5, return_mean=False, seed=1),
            mixing(model.get_latent_representation(), cells.obs["batch"].to_numpy()),
        )
    first = found.table[found.table["rung"] == 1].set_index("candidate")
    best = max(by_hand, key=lambda name: by_hand[name][0].mean())
    assert first.loc[best, "difference"] == 0
    for name, (values, mixed) in by_hand.items():
        row, differences = first.loc[name], values - by_hand[best][0]
        assert row["log_likelihood"] == values.mean()
        assert row["mixing"] == mixed
        assert row["difference"] == pytest.approx(differences.mean(), rel=1e-6)
        assert row["difference_se"] == pytest.approx(stats.sem(differences), rel=1e-6)
    held_out = found.model.validation_indices
    last = found.model.get_thinned_ll(indices=held_out, n_samples=5, seed=1)
    assert found.table["log_likelihood"].iloc[-1] == pytest.approx(last, rel=1e-12)


def global_generators() -> str:
    return str((np.random.get_state()[1].tolist(), np.random.get_state()[2], torch.get_rng_state().tolist()))  # noqa: NPY002


def test_some_of_many_cells_are_scored_the_same_for_all(cells, monkeypatch):
    monkeypatch.setattr(tuning, "MAX_SCORED_CELLS", 17)
    monkeypatch.setattr(tuning, "MAX_MIXED_CELLS", 90)
    scored, mixed = [], []
    thinned, embedding = scgen.SCVI.get_thinned_ll, scgen.SCVI.get_latent_representation

    def spied_thinned(self, *, indices, **options):
        assert set(indices) < set(self.validation_indices)
        scored.append(indices)
        return thinned(self, indices=indices, **options)

    def spied_embedding(self, *, indices):
        z = embedding(self, indices=indices)
        mixed.append((indices, z))
        return z

    monkeypatch.setattr(scgen.SCVI, "get_thinned_ll", spied_thinned)
    monkeypatch.setattr(scgen.SCVI, "get_latent_representation", spied_embedding)
    before = global_generators()
    table = tuned(cells, {name: OWN[name] for name in ("nb", "poisson")}, max_epochs=8).table
    assert global_generators() == before
    assert table["n_scored"].tolist() == [17] * 3
    assert len(np.unique(scored[0])) == 17
    assert all(np.array_equal(rows, scored[0]) for rows in scored)
    batch, rows = cells.obs["batch"].to_numpy(), mixed[0][0]
    assert len(np.unique(rows)) == 90
    assert rows.max() > 200  # from all over the cells
    assert all(np.array_equal(of, rows) for of, _ in mixed)
    by_hand = [mixing(z, batch[rows]) for _, z in mixed]
    assert sorted(by_hand[:2]) == sorted(table["mixing"][:2])
    assert by_hand[2] == table["mixing"].iloc[2]


def test_mixing_by_brute_force():
    rng = np.random.default_rng(0)
    batch = np.repeat(["a", "b", "c"], [50, 30, 20])
    z = rng.normal(size=(100, 3)) + (batch == "a")[:, None]
    distance = ((z[:, None] - z) ** 2).sum(2)
    shares, by_chance = [], []
    for i in range(100):
        others = [j for j in np.argsort(distance[i]) if j != i]
        shares.append(np.mean(batch[others[:15]] != batch[i]))
        by_chance.append(np.mean(batch[others] != batch[i]))
    assert mixing(z, batch) == pytest.approx(np.mean(shares) / np.mean(by_chance), rel=1e-12)
    assert mixing(z + 100 * (batch == "a")[:, None] - 100 * (batch == "b")[:, None], batch) == 0
    assert np.isnan(mixing(z, np.repeat("a", 100)))
    few = mixing(z[:4], np.array(["a", "b", "a", "b"]))  # all three others are neighbours
    assert few == pytest.approx(1)


def trial(name, values, mixed=np.nan):
    return Trial(name, 1, 32, 0.1, np.asarray(values, float), mixed)


def test_likelihood_ranks_and_mixing_only_among_what_it_does_not_tell_apart():
    rng = np.random.default_rng(1)
    best, noise = rng.normal(-100, 30, size=200), rng.normal(0, 2, size=200)
    noise -= noise.mean()
    error = stats.sem(noise)
    within, beyond = best + noise - 0.9 * error, best + noise - 1.1 * error
    trials = [trial("beyond", beyond, 0.99), trial("best", best, 0.5), trial("within", within, 0.6)]
    noisy = best + 3 * noise - 3 * 0.9 * error  # below "beyond", but less surely so
    trials += [trial("noisy", noisy, 0.4), Trial("broken", 1, 32, 0.1, error="NaN")]
    table = tuning._ranking(trials, 2)
    assert table["candidate"].tolist() == ["within", "best", "noisy", "beyond", "broken"]
    assert table["kept"].tolist() == [True, True, False, False, False]
    # What likelihood tells from the best does not go on, however many may.
    assert tuning._ranking(trials, 5)["kept"].tolist() == [True, True, True, False, False]
    assert table["reason"].tolist()[0] == "within one standard error of best: mixing decides"
    assert table["reason"].tolist()[3].endswith("(1.1 standard errors) below best")
    assert table["reason"].tolist()[4] == "failed: NaN"
    # The standard error is of the paired differences: of the values themselves it would be twenty times as much.
    assert stats.sem(best) > 10 * error
    # Without batches, likelihood alone.
    alone = tuning._ranking([trial("within", within), trial("beyond", beyond), trial("best", best)], 1)
    assert alone["candidate"].tolist() == ["best", "within", "beyond"]
    with pytest.raises(FloatingPointError, match='"broken": NaN; "endless": its likelihood is not finite'):
        tuning._ranking([Trial("broken", 1, 32, 0.1, error="NaN"), trial("endless", [-3, -np.inf])], 1)


@pytest.mark.parametrize("name", list(scgen.PRESETS))
def test_presets_are_settings_of_scvi(cells, name):
    model = scgen.SCVI(cells, **scgen.PRESETS[name])
    model.train(1, accelerator="cpu", progress=False)
    assert np.isfinite(model.get_thinned_ll(n_samples=2))


def test_presets_of_one_batch_and_of_several(few, monkeypatch):
    monkeypatch.setattr(tuning, "LEAST_STEPS", 1)
    several = tuned(few, max_epochs=1)
    assert set(several.table["candidate"]) == set(scgen.PRESETS)
    one = few.copy()
    scgen.setup_anndata(one)
    table = tuned(one, max_epochs=1).table
    assert set(table["candidate"]) == set(scgen.PRESETS) - {"nb-batch"}
    assert table["mixing"].isna().all()
    assert len(table[table["rung"] == 1]) == 5
    several = few.copy()
    several.obs["factor"] = np.ravel(several.X.sum(1))
    scgen.setup_anndata(several, batch_key="batch", size_factor_key="factor")
    assert set(tuned(several, max_epochs=1).table["candidate"]) == set(scgen.PRESETS) - {"nb-observed"}


def test_one_or_two_candidates(few):
    alone = tuned(few, ["nb"], max_epochs=2)
    assert alone.best == "nb"
    assert alone.table["reason"].tolist() == ["trained in full"]
    two = tuned(few, ["nb", "zinb"], max_epochs=2)
    assert two.table["rung"].tolist() == [1, 1, 2]
    assert len(tuned(few, {"labels": {"dispersion": "gene-label"}}, max_epochs=1).table) == 1


def test_nothing_is_written_to_the_cells(few):
    before = few.copy()
    tuned(few, ["nb", "zinb", "nb-observed"], max_epochs=2)
    assert (few.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(few.obs, before.obs)
    pd.testing.assert_frame_equal(few.var, before.var)
    assert few.uns["scgen"] == before.uns["scgen"]
    assert set(few.uns) == set(before.uns)
    assert set(few.obsm) == set(before.obsm)


CANDIDATES = {f"latent {n}": {"n_latent": n} for n in (2, 3, 4)}


@pytest.mark.parametrize("method", ["train", "get_thinned_ll"])
@pytest.mark.parametrize("error", [FloatingPointError, torch.cuda.OutOfMemoryError])
def test_a_candidate_that_fails_is_out(few, monkeypatch, method, error):
    original = getattr(scgen.SCVI, method)

    def failing(self, *arguments, **options):
        if self.arguments.n_latent in broken:
            raise error("what is wrong")
        return original(self, *arguments, **options)

    monkeypatch.setattr(scgen.SCVI, method, failing)
    broken = {3}
    table = tuned(few, CANDIDATES, max_epochs=4).table
    assert table[table["rung"] == 1]["candidate"].iloc[-1] == "latent 3"
    row = table[table["candidate"] == "latent 3"]
    assert row["reason"].tolist() == ["failed: what is wrong"]
    assert row["n_scored"].tolist() == [0]
    broken = {2, 3}  # there is nothing to choose any more
    table = tuned(few, CANDIDATES, max_epochs=4).table
    assert table["rung"].tolist() == [1, 1, 1, 2]
    assert table["candidate"].iloc[-1] == "latent 4"
    broken = {2, 3, 4}
    with pytest.raises(FloatingPointError, match=r'no candidate could be trained.*"latent 3": what is wrong'):
        tuned(few, CANDIDATES, max_epochs=4)


@pytest.mark.parametrize("error", [FloatingPointError, torch.cuda.OutOfMemoryError])
def test_the_next_takes_the_place_of_one_that_fails_in_full(few, monkeypatch, error):
    original, failed, n_broken = scgen.SCVI.train, [], 1

    def failing(self, max_epochs, **options):
        if max_epochs == 2 and len(failed) < n_broken:
            failed.append(self.arguments.n_latent)
            raise error("what is wrong")
        original(self, max_epochs, **options)

    monkeypatch.setattr(scgen.SCVI, "train", failing)
    two = {name: CANDIDATES[name] for name in ("latent 2", "latent 3")}
    found = tuned(few, two, max_epochs=2)
    second = found.table[found.table["rung"] == 1]["candidate"].tolist()
    last = found.table[found.table["rung"] == 2]
    assert [f"latent {n}" for n in failed] == second[:1]
    assert last["candidate"].tolist() == second
    assert last["reason"].tolist() == ["failed: what is wrong", "trained in full"]
    assert last["kept"].tolist() == [False, True]
    assert found.best == second[1] == f"latent {found.model.arguments.n_latent}"
    assert len(found.model.history) == 2
    failed, n_broken = [], 2
    with pytest.raises(FloatingPointError, match=f"{second[0]}.*what is wrong.*{second[1]}.*what is wrong"):
        tuned(few, two, max_epochs=2)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_likelihood_that_is_not_finite_is_told(few, monkeypatch, value):
    original, n_calls = scgen.SCVI.get_thinned_ll, []

    def failing(self, **options):
        values = original(self, **options)
        n_calls.append(1)
        if len(n_calls) >= first:
            values[3] = value
        return values

    monkeypatch.setattr(scgen.SCVI, "get_thinned_ll", failing)
    first = 3  # of the chosen one in full: what was trained is kept
    found = tuned(few, ["nb", "zinb"], max_epochs=2)
    last = found.table.iloc[-1]
    assert found.model.is_trained
    assert (last["candidate"], last["kept"]) == (found.best, True)
    assert last["reason"] == "trained in full; its likelihood is not finite"
    assert not np.isfinite(last["log_likelihood"])
    n_calls, first = [], 1
    with pytest.raises(FloatingPointError, match='"nb": its likelihood is not finite; "zinb": its likelihood'):
        tuned(few, ["nb", "zinb"], max_epochs=2)


@pytest.mark.parametrize("when", [2, 9])
def test_an_interrupt_ends_it(few, monkeypatch, when):
    # After the second epoch of a short training, and within the full one: `train` itself would keep what it has.
    calls, before = [], few.copy()
    original = monitoring.Best.stop_after

    def interrupting(self, epoch, value):
        stop = original(self, epoch, value)
        calls.append(epoch)
        if len(calls) == when:
            raise KeyboardInterrupt
        return stop

    monkeypatch.setattr(monitoring.Best, "stop_after", interrupting)
    with pytest.raises(KeyboardInterrupt):
        tuned(few, ["nb", "zinb"], max_epochs=16)
    assert len(calls) == when
    assert few.uns["scgen"] == before.uns["scgen"]
    assert set(few.obsm) == set(before.obsm)


@pytest.mark.parametrize(
    ("presets", "error", "words"),
    [
        (["nb", "nb-depe"], ValueError, r'"?nb-depe.*choose from zinb.*Did you mean "nb-deep"'),
        ("nb", TypeError, "a list of names"),
        ([["nb"]], TypeError, "a list of names"),
        ([None], TypeError, "a list of names"),
        ({"nb"}, TypeError, "a list of names"),
        (3, TypeError, "a list of names"),
        ([], ValueError, "presets is empty"),
        ({"a": ["nb"]}, TypeError, "n_latent"),
        ({"a": {"n_latnt": 3}}, ValueError, r'presets\["a"\].*Did you mean "n_latent"'),
        ({"a": {"seed": 3}}, ValueError, "'seed' is not a setting"),
        ({"a": {"n_latent": 0}, "b": {}}, ValueError, 'candidate "a": n_latent=0'),
        ({"a": {"gene_likelihood": "normal"}}, ValueError, "not a likelihood of counts"),
    ],
)
def test_bad_candidates(few, monkeypatch, presets, error, words):
    monkeypatch.setattr(scgen.SCVI, "train", None)  # they are refused before anything is trained
    with pytest.raises(error, match=words):
        tuned(few, presets)


def test_bad_cells(few):
    with pytest.raises(TypeError, match="not an AnnData"):
        tuned(few.X)
    bare = few.copy()
    del bare.uns["scgen"]
    with pytest.raises(ValueError, match="setup_anndata"):
        tuned(bare)
    with pytest.raises(ValueError, match=r"299 cells.*needs 300"):
        tuned(few[:299].copy())
    for seed in (-1, "a", 1.0):
        with pytest.raises((TypeError, ValueError), match=f"^seed={seed!r}"):
            tuned(few, seed=seed)
    with pytest.raises(ValueError, match="max_epochs=0"):
        tuned(few, max_epochs=0)
    with pytest.raises(ValueError, match='accelerator="mps"'):
        scgen.tune(few, accelerator="mps")
    scgen.setup_anndata(few, counts=False)
    with pytest.raises(ValueError, match="held-out counts"):
        tuned(few)
