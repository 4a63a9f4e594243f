"""What tests of the ops draw their cases with."""

import torch


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pick(generator, choices):
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def normal(generator, *shape, dtype=torch.float32, device=None):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def spread(x, dim):
    """The same tensor as a view whose last index of ``dim`` is more than 2^31 numbers from its first."""
    first = x.select(dim, 0)
    step, rest = 2**31 // (x.shape[dim] - 1) // 16 * 16 + 16, first.contiguous().stride()
    # Not filled, unlike torch.empty in tests.
    storage = torch.UntypedStorage(((x.shape[dim] - 1) * step + first.numel()) * x.itemsize, device=x.device)
    return x.new_empty(0).set_(storage, 0, x.shape, (*rest[:dim], step, *rest[dim:])).copy_(x)
