"""Random numbers from generators of one's own: torch's global ones are neither read nor changed."""

from contextvars import ContextVar, Token

import torch

from scgen.arguments import check_seed

_current: ContextVar["seeded | None"] = ContextVar("scgen_seeded", default=None)


class seeded:
    """Context manager: within the block, everything of scgen that is random follows from the seed.

    The numbers are those that torch's own generators would give after ``torch.manual_seed(seed)``. The block belongs to
    the thread that entered it, so other threads neither see its generators nor disturb them. If it is entered again,
    its numbers go on where they stopped.

    Parameters
    ----------
    seed
        A whole number from 0 to 2^63 - 1.

    Raises
    ------
    TypeError, ValueError
        If the seed is no such number.

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
    """Return the generator of the block that this thread is in; None, which stands for torch's own, outside of one."""
    block = _current.get()
    # Tensors without memory, of which a model is built to learn its shapes, take no random numbers.
    return None if block is None or device.type == "meta" else block.on(device)
