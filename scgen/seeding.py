"""Random numbers from scgen's own generators. torch's global generators are neither read nor changed."""

from contextvars import ContextVar, Token

import torch

from scgen.arguments import check_seed

_current: ContextVar["seeded | None"] = ContextVar("scgen_seeded", default=None)


class seeded:
    """Context manager: within the block, all random numbers of scgen depend only on the seed.

    The numbers are those that torch's global generators would give after ``torch.manual_seed(seed)``. The block belongs
    to the thread that entered it; other threads neither use its generators nor change them. If the block is entered
    again, its numbers continue where they stopped.

    Parameters
    ----------
    seed
        A whole number from 0 to 2^63 - 1.

    Raises
    ------
    TypeError, ValueError
        If the seed is not such a number.

    Examples
    --------
    >>> import torch
    >>> from scgen.seeding import generator, seeded
    >>> with seeded(1):
    ...     ours = torch.randn(3, generator=generator(torch.device("cpu")))
    >>> torch.equal(ours, torch.randn(3, generator=torch.Generator().manual_seed(1)))
    True
    """

    def __init__(self, seed: int):
        self.seed = check_seed(seed)
        self._generators: dict[torch.device, torch.Generator] = {}
        self._tokens: list[Token] = []

    def __enter__(self) -> "seeded":
        self._tokens.append(_current.set(self))
        return self

    def __exit__(self, *_) -> None:
        _current.reset(self._tokens.pop())

    def on(self, device: torch.device) -> torch.Generator:
        """Return the generator for a device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


def generator(device: torch.device) -> torch.Generator | None:
    """Return the generator of this thread's block; outside a block None, which means torch's global generator."""
    block = _current.get()
    # A model is built on the meta device to find its shapes. Tensors there take no random numbers.
    return None if block is None or device.type == "meta" else block.on(device)


def standard_normal(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Return standard normal numbers of the dtype and on the device of ``like``."""
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator(like.device))
