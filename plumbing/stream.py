"""A dataset read ahead by worker processes, with one clear sentence for bad input."""

import torch

from plumbing.settings import InputError


def take(dataset: torch.utils.data.Dataset, order: list[int], workers: int = 0):
    """Yields dataset[i] for i in `order`, read ahead by `workers` processes (0: in this one). Raises InputError."""
    # A loader draws a seed when it starts: from a generator of its own, or a resumed run has other dropout masks.
    own = torch.Generator()
    loader = torch.utils.data.DataLoader(dataset, sampler=order, batch_size=None, num_workers=workers, generator=own)
    for item in loader:
        if isinstance(item, InputError):
            raise item
        yield item
