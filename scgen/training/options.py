"""How to train: the options of a training, their defaults, and the schedule of the learning rate."""

import math
from dataclasses import dataclass

import torch

from scgen.arguments import MOST_EPOCHS, check_choice, check_flag, check_number, check_seed, check_whole, set_fields


@dataclass(frozen=True)
class Options:
    """How to train; see `Model.train` for the meaning of each."""

    max_epochs: int | None
    learning_rate: float
    kl_start: float
    batch_penalty: float
    n_importance_samples: int
    early_stopping: bool
    patience: int | None
    device: torch.device
    precision: str
    seed: int
    progress: bool
    epsilon: float = 0.01  # of Adam; each class of models has its own

    def __post_init__(self):
        plain = {
            "learning_rate": check_number("learning_rate", self.learning_rate, "a positive number", above=0),
            "kl_start": check_number("kl_start", self.kl_start, "a weight from 0", least=0),
            "batch_penalty": check_number("batch_penalty", self.batch_penalty, "a weight from 0", least=0),
            "n_importance_samples": check_whole("n_importance_samples", self.n_importance_samples, 1),
            "seed": check_seed(self.seed),
        }
        for name, most in (("max_epochs", MOST_EPOCHS), ("patience", None)):
            if getattr(self, name) is not None:
                plain[name] = check_whole(name, getattr(self, name), 1, most)
        for name in ("early_stopping", "progress"):
            plain[name] = check_flag(name, getattr(self, name))
        plain["precision"] = check_choice("precision", self.precision, ("auto", "32", "bf16"))
        if self.precision == "auto":
            plain["precision"] = "bf16" if has_fast_bfloat16(self.device) else "32"
        set_fields(self, plain)

    def check(self, batch_size: int | None, train_size: float, devices: int) -> None:
        """Raise where the other arguments of `Model.train` are of a wrong kind, or out of their range."""
        if batch_size is not None:
            check_whole("batch_size", batch_size, 3)
        check_number("train_size", train_size, "a share above 0 and up to 1", above=0, most=1)
        if check_whole("devices", devices, 1) != 1:
            raise ValueError(f"devices={devices!r}: this version trains on one device; use devices=1.")


def choose_device(accelerator: str) -> torch.device:
    """Return the device for "auto", "cpu" or "gpu" ("cuda"). Raise ValueError for other values, or without a GPU."""
    if not isinstance(accelerator, str) or accelerator not in ("cuda", "mps"):
        check_choice("accelerator", accelerator, ("auto", "cpu", "gpu"))
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(f'accelerator="{accelerator}", but torch sees no GPU here. Use accelerator="cpu" or "auto".')
    if accelerator == "mps":
        raise ValueError(
            'accelerator="mps" is not supported: the likelihoods need float64, which Apple\'s MPS lacks. Use '
            'accelerator="cpu".'
        )
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every release
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def default_batch_size(n_cells: int, device: torch.device) -> int:
    """Return the number of cells in a minibatch that gives 400 minibatches in 50 passes, between 64 and 512.

    On a GPU, where a larger minibatch hardly takes longer, it is the number that gives 400 in 25 passes, up to 4096.
    """
    size = min(max(n_cells * 50 // 400, 64), 512)
    return size if device.type != "cuda" else max(size, min(n_cells * 25 // 400, 4096))


def default_epochs(n_steps: int) -> int:
    """Return the number of passes, each of ``n_steps`` minibatches, that gives 400 steps, between 25 and 50.

    With more passes over few cells, the model overfits (benchmarks/NOTES.md).
    """
    return min(max(math.ceil(400 / n_steps), 25), 50)


def warmup_cosine(progress: float) -> float:
    """Return the learning rate, as a share of its peak, after a share of the steps.

    It rises linearly for a tenth of the steps, and then falls to 0 along a cosine.
    """
    rise = 0.1
    if progress < rise:
        return max(progress / rise, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))
