"""What the console, `print` and notebooks show of a model, a query and a tuning."""

import copy
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

import scgen
from scgen.workflows.tuning import Tuning


@pytest.fixture(scope="module")
def cells():
    cells = scgen.simulate_cells(n_cells=60, n_genes=10, n_batches=2, seed=1)
    cells.obs["batch"] = cells.obs["batch"].cat.rename_categories(["<script>alert(1)</script>", "b & c"])
    scgen.setup_anndata(cells, batch_key="batch")
    return cells


@pytest.fixture(scope="module")
def model(cells):
    model = scgen.SCVI(cells, n_latent=2, n_hidden=4, gene_likelihood="nb")
    model.train(2, progress=False)
    return model


class Cells(HTMLParser):
    """The tags and the texts of HTML, as a browser reads it."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_a_model_that_was_trained(model):
    title, *rows = str(model).splitlines()
    assert title == "SCVI model of 60 cells x 10 genes"
    assert rows[:2] == [
        "    batches: 2 (<script>alert(1)</script>, b & c)",
        "    arguments: n_latent=2, n_hidden=4, gene_likelihood='nb'",
    ]
    best, seconds = max(model.history["elbo_validation"]), sum(model.history["seconds"])
    assert rows[2:] == [f"    training: 2 epochs in {seconds:.0f} s, best validation ELBO {best:.1f} nats per cell"]
    assert "\n" not in repr(model)
    assert repr(model).startswith("SCVI model of 60 cells x 10 genes; batches: 2 (")
    assert f"{model}" == str(model)


def test_html_says_the_same_with_names_escaped(model):
    html = Cells(model._repr_html_())
    assert set(html.tags) == {"table", "caption", "tr", "th", "td"}
    title, *rows = str(model).splitlines()
    assert html.texts[0] == title
    assert [f"    {name}: {told}" for name, told in zip(html.texts[1::2], html.texts[2::2], strict=True)] == rows


def test_a_model_that_was_not_trained(cells):
    scgen.setup_anndata(cells)
    lines = str(scgen.SCVI(cells)).splitlines()
    scgen.setup_anndata(cells, batch_key="batch")
    assert lines == ["SCVI model of 60 cells x 10 genes", "    arguments: the defaults", "    training: none"]


def test_a_model_that_was_loaded(model, tmp_path):
    model.save(tmp_path)
    loaded = scgen.SCVI.load(tmp_path)
    assert str(loaded) == str(model).replace("60 cells", "no cells")
    assert str(scgen.SCVI.load(tmp_path, model.adata)) == str(model)


def test_what_is_known_of_a_training(model):
    told = copy.copy(model)
    bound = {"elbo_validation": [-30.04, -20.06, -25.0]}
    for history, training, expected in (
        ({**bound, "seconds": [40.0, 50.0, 60.0]}, {}, "3 epochs in 2.5 min, best validation ELBO -20.1 nats per cell"),
        (bound, {"finished": True}, "3 epochs, best validation ELBO -20.1 nats per cell"),
        ({"elbo_train": [-1.0]}, {"finished": False}, "1 epoch, interrupted"),
        (
            bound,
            {"n_importance_samples": 5},
            "3 epochs, best validation importance-weighted bound -20.1 nats per cell",
        ),
        ({}, {"trained_by": "scvi-tools 1.4.2"}, "by scvi-tools 1.4.2"),
        ({}, {}, "done, without a history"),
    ):
        told.history, told.trainings = pd.DataFrame(history), [training]
        assert str(told).splitlines()[-1] == f"    training: {expected}"


def test_a_query(model):
    new = model.adata[:20, :8].copy()
    new.obs["batch"] = ["b & c"] * 10 + ["<b>new</b>"] * 10
    query = model.query(new)
    lines = [
        "Query of 20 cells",
        "    genes: 8 of 10 (80%), by their names in adata.var_names",
        "    new in batch: <b>new</b>",
        "    taken for the reference's own in batch: b & c",
    ]
    assert str(query).splitlines() == lines
    assert "b" not in Cells(query._repr_html_()).tags
    assert "<b>new</b>" in Cells(query._repr_html_()).texts
    query.train(1, progress=False)
    *same, last = str(query).splitlines()
    assert same == lines
    assert last.startswith("    training: 1 epoch in ")
    assert repr(query) == "; ".join(line.strip() for line in str(query).splitlines())


def test_large_numbers_of_genes_have_commas():
    adata = scgen.simulate_cells(n_cells=60, n_genes=1100, seed=0)
    scgen.setup_anndata(adata)
    model = scgen.SCVI(adata, n_hidden=8, n_latent=2)
    model.train(1, progress=False)
    assert "genes: 1,000 of 1,100 (91%)" in str(model.query(adata[:20, :1000].copy()))


def test_a_query_whose_batches_were_removed_is_still_shown(model):
    new = model.adata[:20].copy()
    query = model.query(new)
    del new.obs["batch"]
    assert str(query) == "Query of 20 cells\n    genes: 10 of 10 (100%), by their names in adata.var_names"


def test_a_tuning(model):
    table = pd.DataFrame({"candidate": ["nb", "zinb", "nb"], "log_likelihood": np.zeros(3)})
    tuning = Tuning(model, "nb", table)
    title, best, of_model, *rest = str(tuning).splitlines()
    assert (title, best) == ("Tuning of 2 candidates in 3 trainings", "    best: nb")
    assert [of_model.replace("    model: ", ""), *rest] == str(model).splitlines()
    assert "<script>" not in tuning._repr_html_()


def test_completion_lists_what_users_call(model):
    listed = {name for name in dir(model) if not name.startswith("_")}
    internal = {"assemble", "build", "Arguments", "fingerprint", "require_training", "source", "source_rows"}
    assert not listed & internal
    assert not set(dir(scgen.SCVI)) & internal
    assert all(hasattr(model, name) for name in internal)  # other parts of scgen use them
    assert {"adata", "history", "trainings", "vae", "train", "query", "save", "get_cluster_probs"} <= listed
    assert {"load", "from_scvi_tools", "setup_anndata", "train"} <= set(dir(scgen.SCVI))
    query = {name for name in dir(model.query(model.adata.copy())) if not name.startswith("_")}
    assert {"model", "reference", "train", "transfer_labels", "typicality"} <= query
