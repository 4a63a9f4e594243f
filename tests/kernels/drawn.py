"""What tests of the ops draw their cases with."""

import torch


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pick(generator, choices):
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def normal(generator, *shape, dtype=torch.float32, device=None):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
