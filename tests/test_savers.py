"""Several processes that save to one folder, and load from it, at once.

The test runs a few rounds. ``python tests/test_savers.py`` runs 200, with two processes and with four.
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import scgen

SECONDS = 120


def several(n):
    """Return models that are told by their seed, and by their weights."""
    cells = scgen.simulate_cells(n_cells=60, n_genes=200, n_batches=2, seed=0)
    scgen.setup_anndata(cells, batch_key="batch")
    return [scgen.SCVI(cells, n_hidden=64, seed=seed) for seed in range(n)]


def seed_of(loaded, models):
    """Return which of the models was loaded, after checking that description and weights are both of that one."""
    seed = loaded.arguments.seed
    wanted, found = models[seed].vae.state_dict(), loaded.vae.state_dict()
    assert wanted.keys() == found.keys()
    assert all(wanted[name].equal(found[name]) for name in wanted), f"the weights are not those of seed {seed}"
    return seed


def save_and_load(folder, models, rank, n_rounds, barrier, answers):
    """Save in each round, together with the others, then load; answer what happened."""
    for i in range(n_rounds):
        barrier.wait(SECONDS)
        error, alone = "", False
        try:
            models[rank].save(folder / "replaced", overwrite=True)
            seed_of(scgen.SCVI.load(folder / "replaced"), models)
            with contextlib.suppress(FileExistsError):  # in a new folder one of them succeeds
                models[rank].save(folder / f"new-{i}")
                alone = True
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        answers.put((rank, error, alone))
        barrier.wait(SECONDS)


def rounds(folder, n, n_rounds):
    """Return what went wrong, and how many files are left, of ``n`` processes in so many rounds."""
    torch.set_num_threads(1)  # else the threads would be missing after a fork
    context = multiprocessing.get_context("fork")
    models, faults, last = several(n), [], []
    barrier, answers = context.Barrier(n + 1), context.Queue()
    children = [
        context.Process(target=save_and_load, args=(folder, models, rank, n_rounds, barrier, answers), daemon=True)
        for rank in range(n)
    ]
    for child in children:
        child.start()
    for i in range(n_rounds):
        barrier.wait(SECONDS)
        found = [answers.get(timeout=SECONDS) for _ in children]
        faults += [f"round {i}, process {rank}: {error}" for rank, error, _ in found if error]
        try:
            last.append(seed_of(scgen.SCVI.load(folder / "replaced"), models))
            kept = seed_of(scgen.SCVI.load(folder / f"new-{i}"), models)
            alone = [rank for rank, _, alone in found if alone]
            assert alone == [kept], f"processes {alone} say that they made the new folder, which has {kept}'s model"
        except Exception as error:
            faults.append(f"round {i}, afterwards: {type(error).__name__}: {error}")
        barrier.wait(SECONDS)
    for child in children:
        child.join(SECONDS)
    assert n_rounds < 10 or len(set(last)) > 1, "one process is always the last: they do not meet"
    return faults, len(list((folder / "replaced").iterdir()))


def run(n, n_rounds):
    with tempfile.TemporaryDirectory() as folder:
        faults, n_files = rounds(Path(folder), n, n_rounds)
    print(*faults, sep="\n", end="\n" if faults else "")
    print(f"{n} processes, {n_rounds} rounds: {len(faults)} faults; files in the folder at the end: {n_files}")
    return not faults


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to start savers fast")
@pytest.mark.parametrize("n", [2, 4])
def test_savers_and_loaders_of_one_folder(n):
    # The copy of the package that is tested, and not one that is installed.
    path = {"PYTHONPATH": str(Path(scgen.__file__).parents[1])}
    command = [sys.executable, __file__, str(n), "15"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{n} processes, 15 rounds: 0 faults" in done.stdout


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(not run(int(sys.argv[1]), int(sys.argv[2])))
    results = [run(n, 200) for n in (2, 4)]
    sys.exit(not all(results))
