"""The score table: scib-metrics' numbers, averaged as said."""

import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import silhouette_score

from scgen.evaluation.scores import integration_scores


def embedded(n=300):
    """Return two embeddings, of mixed and of separate batches, with well separated labels."""
    rng = np.random.default_rng(0)
    label, batch = np.arange(n) % 3, rng.integers(2, size=n)
    mixed = rng.normal(size=(n, 4)) + 12 * np.eye(4)[label]
    apart = mixed + 60 * np.eye(4)[3] * batch[:, None]
    return {"mixed": mixed, "apart": apart}, pd.Series(batch), pd.Series(label)


def explained_by(batch: pd.Series, z: np.ndarray) -> float:
    """Return the share of an embedding's variance that the means of two batches explain."""
    centred = z - z.mean(0)
    between = sum((batch == code).sum() * centred[batch == code].mean(0) ** 2 for code in (0, 1))
    return between.sum() / (centred**2).sum()


def test_scores():
    pytest.importorskip("scib_metrics", reason="scib-metrics is not installed (the extra named scores)")
    embeddings, batch, labels = embedded()
    table = integration_scores(embeddings, batch, labels, embeddings["apart"])
    assert table.loc["batch", "mixed"] > table.loc["batch", "apart"] + 0.2
    assert table.loc["iLISI", "apart"] < 0.05
    of_bio = ["Isolated labels", "KMeans NMI", "KMeans ARI", "Silhouette label", "cLISI"]
    of_batch = table.index.drop([*of_bio, "bio", "batch", "total"])
    assert set(of_batch) > {"iLISI", "KBET", "Graph connectivity", "PCR comparison"}
    assert len(of_batch) == 5
    before = explained_by(batch, embeddings["apart"])
    for name, z in embeddings.items():
        values = table[name]
        assert values["Silhouette label"] == pytest.approx((silhouette_score(z, labels) + 1) / 2, abs=1e-4)
        assert values["PCR comparison"] == pytest.approx(1 - explained_by(batch, z) / before, abs=1e-4)
        assert values["bio"] == pytest.approx(values[of_bio].sum() / 5)
        assert values["batch"] == pytest.approx(values[of_batch].sum() / 5)
        assert values["total"] == pytest.approx(0.6 * values["bio"] + 0.4 * values["batch"])


def test_what_is_missing_is_said(monkeypatch):
    embeddings, batch, labels = embedded()
    monkeypatch.setitem(sys.modules, "scib_metrics.benchmark", None)  # as if not installed
    with pytest.raises(ImportError, match=r"scgen-vae\[scores\]"):
        integration_scores(embeddings, batch, labels, embeddings["apart"])
