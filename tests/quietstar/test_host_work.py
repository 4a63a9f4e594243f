"""What makes the host wait for the device: nothing in a body that becomes a graph, and little in a training step."""

import sys
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import quietstar
from quietstar.config import TrainConfig
from quietstar.hf.graphs import HostWork
from quietstar.train import train


@pytest.mark.parametrize(
    "work, name",
    [
        (lambda x: x * x.sum().item(), "_local_scalar_dense"),
        (lambda x: x if x.any() else -x, "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.index_put((x > 0,), x[0]), "index_put"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: x if torch.equal(x, x) else -x, "equal"),
        (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
        (lambda x: x + torch.tensor([1.0]), "lift_fresh"),
        (lambda x: x.to("meta"), "_to_copy"),
        (lambda x: x + torch.rand(4), "rand"),
        (lambda x: torch.nn.functional.dropout(x), "bernoulli"),
        (lambda x: x[x.long()] + x.cumsum(0).masked_fill(x > 0, 0) + torch.ones(4) + torch.where(x > 1, x, 2.0), None),
    ],
)
def test_work_for_the_host_is_seen(work, name):
    with HostWork(torch.device("cpu")) as host:
        work(torch.arange(4.0))
    assert host.found is None if name is None else f"aten.{name}" in host.found and "test_host_work.py" in host.found


class Reads(TorchFunctionMode):
    """Counts where values go to Python, by the file that asks."""

    METHODS = {Tensor.tolist, Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.cpu, Tensor.numpy}

    def __init__(self):
        super().__init__()
        self.files = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.METHODS:
            self.files[sys._getframe(1).f_code.co_filename.rpartition("/")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("anchors, more", [("all", 0), ("random", 1)])
def test_the_training_loop_reads_once_a_step(tiny, tmp_path, anchors, more):
    """However many parts a step has; places for anchors cost a second one, for their width."""
    data = [{"input_ids": torch.randint(3, 61, (10,), generator=torch.Generator().manual_seed(i))} for i in range(8)]
    reads = {}
    for parts, steps in [(1, 1), (1, 3), (4, 3)]:
        options = {"anchors": anchors, "kl_weight": 0.1, "policy_temperature": 1.0}
        config = quietstar.ThoughtConfig(thoughts=2, thought_tokens=2, lookahead=2, **options)
        qs = quietstar.QuietStar(tiny("llama"), config, verify=False)
        out = str(tmp_path / f"{parts} {steps}")
        with Reads() as counted:
            train(qs, data, TrainConfig(out=out, steps=steps, batch_size=4, accumulation=parts), progress=False)
        reads[parts, steps] = sum(counted.files[name] for name in ("train.py", "parts.py", "figures.py", "processes.py"))
    assert reads[1, 3] == reads[4, 3] == reads[1, 1] + 2 * (1 + more)
