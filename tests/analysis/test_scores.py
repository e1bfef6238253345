"""The score table: scib-metrics' numbers, averaged as said."""

import sys

import numpy as np
import pandas as pd
import pytest

from scgen.analysis.scores import integration_scores


def embedded(n=300):
    """Return two embeddings, of mixed and of separate batches, with well separated labels."""
    rng = np.random.default_rng(0)
    label, batch = np.arange(n) % 3, rng.integers(2, size=n)
    mixed = rng.normal(size=(n, 4)) + 12 * np.eye(4)[label]
    apart = mixed + 60 * np.eye(4)[3] * batch[:, None]
    return {"mixed": mixed, "apart": apart}, pd.Series(batch), pd.Series(label)


def test_scores():
    pytest.importorskip("scib_metrics", reason="scib-metrics is not installed (the extra named scores)")
    embeddings, batch, labels = embedded()
    table = integration_scores(embeddings, batch, labels, embeddings["apart"])
    assert table.loc["batch", "mixed"] > table.loc["batch", "apart"] + 0.2
    assert table.loc["iLISI", "apart"] < 0.05
    parts = table.drop(index=["bio", "batch", "total"])
    assert len(parts) >= 8
    for name in embeddings:
        bio, mixing, total = table.loc[["bio", "batch", "total"], name]
        assert total == pytest.approx(0.6 * bio + 0.4 * mixing)
        assert min(parts[name]) - 1e-9 <= min(bio, mixing) <= max(bio, mixing) <= max(parts[name]) + 1e-9


def test_what_is_missing_is_said(monkeypatch):
    embeddings, batch, labels = embedded()
    monkeypatch.setitem(sys.modules, "scib_metrics.benchmark", None)  # as if not installed
    with pytest.raises(ImportError, match=r"scgen-vae\[scores\]"):
        integration_scores(embeddings, batch, labels, embeddings["apart"])
