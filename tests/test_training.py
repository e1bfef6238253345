"""The parts of the training loop that have an oracle of their own."""

import copy
import subprocess
import sys
import textwrap

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

import scgen
from scgen.data.stores import DeviceStore, MemoryStore
from scgen.models import loaders
from scgen.training.loop import fit
from scgen.training.optimizer import Adam
from scgen.training.options import Options, default_batch_size


def test_adam_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    adam, optimizer = Adam(ours), torch.optim.Adam(theirs.parameters(), eps=0.01, weight_decay=1e-6)
    for step in range(20):
        x, learning_rate = torch.randn(7, 5), 0.1 / (step + 1)
        ours(x).square().sum().backward()
        adam.step(learning_rate)
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        theirs(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert all(weight.grad is None for weight in ours.parameters())


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


@pytest.mark.parametrize("device", DEVICES)
def test_steps_after_a_spike_are_those_of_clipped_gradients(device):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2)).to(device) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    adam, optimizer = Adam(ours), torch.optim.Adam(theirs.parameters(), lr=0.1, eps=0.01, weight_decay=1e-6)
    usual, clipped = None, []
    for step in range(30):
        x = torch.randn(50, 5).to(device) * (1000 if step in (10, 11, 20) else 1)
        ours(x).square().mean().backward()
        adam.step(0.1)
        optimizer.zero_grad()
        theirs(x).square().mean().backward()
        limit = np.inf if usual is None else 3 * usual
        length = float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit))
        clipped += [step] if length > limit else []
        usual = length if usual is None else 0.9 * usual + 0.1 * min(length, limit)
        optimizer.step()
    assert clipped == [10, 11, 20]
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def moved(gradients, device):
    """Return how far steps with these gradients, of both of two weights, move them from 0."""
    layer = torch.nn.Linear(2, 1, bias=False).to(device)
    torch.nn.init.zeros_(layer.weight)
    adam = Adam(layer)
    for gradient in gradients:
        layer.weight.grad = torch.full((1, 2), gradient, device=device)
        adam.step(0.1)
    return layer.weight[0, 0].item()


def moved_by_torch(gradients):
    """Return the same, of torch's Adam, which clips nothing."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1, eps=0.01, weight_decay=1e-6)
    for gradient in gradients:
        weight.grad = torch.tensor([gradient])
        optimizer.step()
    return weight.item()


@pytest.mark.parametrize("device", DEVICES)
def test_steps_without_a_gradient_say_nothing_of_what_is_usual(device):
    # As of the rows of a new batch whose cells are in one minibatch of ten.
    gradients = [1.0 if step % 10 == 3 else 0.0 for step in range(200)]
    assert moved(gradients, device) == pytest.approx(moved_by_torch(gradients), rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_length_that_overflows_is_a_spike_like_others(device):
    # Two gradients of 3e38 are longer than float32 can tell, and count for nothing; the limit then rises from 3 to 3.6,
    # and with each spike again by a fifth.
    gradients = [*[1.0] * 10, 3e38, *[1000.0] * 3]
    clipped = [*[1.0] * 10, 0.0, 3.6, 4.32, 5.184]
    assert moved(gradients, device) == pytest.approx(moved_by_torch(clipped), rel=1e-5)


def simulated(**arguments):
    adata = scgen.simulate_cells(n_cells=120, n_genes=30, n_batches=2, seed=0, **arguments)
    scgen.setup_anndata(adata, batch_key="batch")
    return adata


def test_training_from_a_device_store_is_the_same(monkeypatch):
    histories = []
    for on_device in (lambda store, device: store, DeviceStore):
        monkeypatch.setattr("scgen.models.loaders.on_device", on_device)
        model = scgen.SCVI(simulated())
        model.train(3, accelerator="cpu", progress=False)
        histories.append(model.history.drop(columns="seconds"))
    assert histories[0].equals(histories[1])


@pytest.mark.parametrize("cause", ["a value", "the learning rate"])
def test_a_loss_that_is_looked_at_once_an_epoch_names_who_is_to_blame(monkeypatch, cause):
    # On a GPU every step is taken before the first look: as here, where a step's loss always passes for finite.
    finite, read = torch.isfinite, MemoryStore.rows
    monkeypatch.setattr(torch, "isfinite", lambda x: torch.tensor(True) if x.dim() == 0 else finite(x))
    model = scgen.SCVI(simulated())
    model.train(2, accelerator="cpu", batch_size=30, progress=False)
    good = {name: tensor.clone() for name, tensor in model.vae.state_dict().items()}
    row = model.train_indices[7]

    def damaged(self, index, as_sparse=False):
        values = read(self, index, as_sparse).to_dense()
        values[index == row, 5] = torch.nan
        return values.to_sparse_csr() if as_sparse else values

    if cause == "a value":
        monkeypatch.setattr(MemoryStore, "rows", damaged)
    named = rf"Cells: cell_{row + 1}; genes: gene_6\." if cause == "a value" else "Cells: none by itself"
    with pytest.raises(FloatingPointError, match=named):
        model.train(
            2, accelerator="cpu", batch_size=30, progress=False, learning_rate=1e-3 if cause == "a value" else 1e30
        )
    assert len(model.history) == 2
    assert all(torch.equal(good[name], tensor) for name, tensor in model.vae.state_dict().items())


def test_training_loads_no_compiler_nor_what_is_for_plots_and_neighbours():
    code = """
        import sys, scgen
        adata = scgen.simulate_cells(n_cells=50, n_genes=20, seed=0)
        scgen.setup_anndata(adata, batch_key="batch")
        scgen.SCVI(adata).train(1, progress=False)
        print(*{"torch._dynamo", "scanpy", "sklearn", "matplotlib"} & set(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("device", "n_cells", "size"),
    [
        ("cpu", 100, 64),
        ("cpu", 2000, 250),
        ("cpu", 10**6, 512),
        ("cuda", 2000, 250),
        ("cuda", 16_000, 1000),
        ("cuda", 10**6, 4096),
    ],
)
def test_minibatches_grow_with_the_data(device, n_cells, size):
    assert default_batch_size(n_cells, torch.device(device)) == size


def test_few_cells_are_not_learned_by_heart():
    adata = scgen.simulate_cells(n_cells=1200, n_genes=300, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    few, unseen = adata[:200].copy(), np.arange(200, 1200)

    def bound(max_epochs):
        model = scgen.SCVI(few)
        model.train(max_epochs, progress=False)
        return model.get_elbo(adata, indices=unseen)

    default, *others = (bound(epochs) for epochs in (None, 25, 100, 400))
    assert default > max(others)


@pytest.mark.parametrize("device", DEVICES)
def test_a_state_goes_on_to_the_same_weights(device):
    """Whatever the epoch: what is saved after it holds all that the rest of the training depends on."""
    adata = scgen.simulate_cells(n_cells=200, n_genes=30, n_batches=2, seed=0)
    scgen.setup_anndata(adata, batch_key="batch")
    plan = (8, 0.02, 4.0, 20.0, 1, True, 3, torch.device(device), "32", 0, False)

    def trained(**how):
        model = scgen.SCVI(adata, n_hidden=16)
        loaders_of_it = loaders.of_training(model, Options(*plan), 64, 0.9)
        rows = how.pop("rows", [])
        told = fit(model.vae, *loaders_of_it, Options(*plan), rows, **how)
        return model.vae.state_dict(), [row["elbo_train"] for row in rows], told

    saved, rows = {}, []
    weights, elbos, told = trained(
        rows=rows, on_state=lambda state: saved.update({state.epoch: copy.deepcopy((state.state_dict(), list(rows)))})
    )
    assert len(saved) == len(elbos) > 4
    for epoch in (1, 4, len(elbos) - 1, len(elbos)):
        state, before = saved[epoch]
        again, elbos_again, told_again = trained(rows=before, resume=state)
        assert elbos_again == elbos
        assert told_again == told
        assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


#: A stand-in for the package ipywidgets: what tqdm imports of it.
WIDGETS = "class HBox: pass\nclass HTML: pass\nclass FloatProgress: pass\n"


@pytest.mark.parametrize("installed", [True, False])
def test_the_progress_line_in_a_notebook(installed, tmp_path):
    (tmp_path / "ipywidgets.py").write_text(WIDGETS)
    # What is None in sys.modules cannot be imported.
    first = f"sys.path.insert(0, {str(tmp_path)!r})" if installed else 'sys.modules["ipywidgets"] = None'
    code = f"""
        import sys
        {first}
        from scgen.training.loop import progress_bar
        import tqdm.notebook
        with progress_bar(2, "training", "epoch", shown={not installed}) as bar:
            bar.update(2)
        print(isinstance(bar, tqdm.notebook.tqdm_notebook))
        """
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(code))])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = {"stdout": "", "stderr": ""}
    for output in notebook.cells[0].outputs:
        told[output.name] += output.text
    assert told["stdout"] == f"{installed}\n"
    assert "Warning" not in told["stderr"]
    assert ("training: 100%" in told["stderr"]) is not installed
