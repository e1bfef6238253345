"""The parts of the training loop that have an oracle of their own."""

import subprocess
import sys
import textwrap

import torch

from scgen.training import Adam


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
