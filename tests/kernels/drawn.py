"""What tests of the ops draw their cases with."""

import torch


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pick(generator, choices):
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def normal(generator, *shape, dtype=torch.float32, device=None):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def far_apart(tensors):
    """The same tensors of one dtype as views of one storage, their three batch rows 2^30 numbers apart: more than 32 bits."""
    step, start, like = 1 << 30, 0, tensors[0]
    numbers = 2 * step + sum(x[0].numel() for x in tensors)
    storage = torch.UntypedStorage(numbers * like.itemsize, device=like.device)  # not filled, unlike torch.empty in tests
    views = []
    for x in tensors:
        view = like.new_empty(0).set_(storage, start, x.shape, (step, *x[0].contiguous().stride()))
        views.append(view.copy_(x))
        start += x[0].numel()
    return views


def spread(x, dim):
    """The same tensor as a view whose last index of ``dim`` is more than 2^31 numbers from its first."""
    first = x.select(dim, 0)
    step, rest = 2**31 // (x.shape[dim] - 1) // 16 * 16 + 16, first.contiguous().stride()
    storage = torch.UntypedStorage(((x.shape[dim] - 1) * step + first.numel()) * x.itemsize, device=x.device)
    return x.new_empty(0).set_(storage, 0, x.shape, (*rest[:dim], step, *rest[dim:])).copy_(x)
