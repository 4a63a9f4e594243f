"""quietstar_kernels.parallel on two processes, each ``python test_parallel.py FOLDER``, against one that has all."""

import json
import re
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from quietstar_kernels import (
    ThoughtLayout,
    gather_text,
    linear_logprob,
    text_attention,
    thought_attention,
    vocab_parallel_logprob,
)
from quietstar_kernels.testing import assert_op_close_as_plain, forward_backward, logprob_inputs, plain_logprob

OPTIONS = {"scale": 1.7, "softcap": 5.0, "temperature": 0.7, "banned": (0, 7, 40, 100)}
EXACT = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Whole(torch.autograd.Function):
    """The identity. Its backward adds up what the ranks made of a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


def over_ranks(cuts, **fixed):
    """The op of a whole weight, of which each rank gives its rows."""

    def op(hidden, weight, targets, bias=None, **options):
        first, end = cuts[dist.get_rank() :][:2]
        weight, bias = Whole.apply(weight)[first:end], None if bias is None else Whole.apply(bias)[first:end]
        return vocab_parallel_logprob(hidden, weight, targets, bias, first_id=first, **options, **fixed)

    return op


def equal_to_one(inputs, options, cuts, entropy=True, backend="reference", **bounds):
    """Results and gradients of the op of one process and of the sharded one."""
    grads = tuple(torch.randn(1 + entropy, len(inputs["hidden"]), generator=seeded(1), dtype=torch.float64))
    fixed = {"return_entropy": entropy, "backend": backend}
    found = forward_backward(over_ranks(cuts, **fixed), inputs, grads, **options)
    torch.testing.assert_close(found, forward_backward(linear_logprob, inputs, grads, **options, **fixed), **bounds)


def head(name, **options):
    return logprob_inputs(seeded(0), 40, 16, 101, bias=True, dtype=getattr(torch, name), **options)


def head_equals_the_op():
    for options in ({}, OPTIONS):
        for entropy in (False, True):
            equal_to_one(head("float64", banned=OPTIONS["banned"]), options, [0, 37, 101], entropy, **EXACT)


def head_errs_as_plain():
    for backend, dtype, keep in [
        ("cpu", "float32", 2**20), ("cpu", "float32", 0), ("cpu", "bfloat16", 2**20), ("cpu", "bfloat16", 0),
        ("triton", "float32", 2**20), ("triton", "float32", 0), ("triton", "float16", 2**20),
    ]:  # fmt: skip
        for options in ({}, OPTIONS):
            inputs = head(dtype, banned=OPTIONS["banned"])
            grads = tuple(torch.randn(2, 40, generator=seeded(1)))
            terms = {"hidden": float(grads[0].abs().max() * inputs["weight"].abs().max())}
            op = over_ranks([0, 37, 101], return_entropy=True, backend=backend, keep_bytes=keep)
            assert_op_close_as_plain(op, plain_logprob, inputs, grads, f"{backend} {dtype} {keep}", terms, **options)


def head_with_a_shard_that_has_no_id():
    inputs = head("float64", banned=range(37, 101))
    equal_to_one(inputs, {"banned": range(37, 101)}, [0, 37, 101], **EXACT)  # Megatron's padding, but more of it
    equal_to_one(inputs, {}, [0, 101, 101], **EXACT)


def head_with_nan():
    """In one row, and infinity in an id of the second rank that a ban or a soft cap makes harmless, or nothing."""
    for options in ({"banned": (60,)}, {"softcap": 5.0}, {}):
        inputs = head("float64", banned=(60,))
        inputs["hidden"][3, 5], inputs["bias"][60] = torch.nan, torch.inf
        equal_to_one(inputs, options, [0, 37, 101], **EXACT)


class Scorer(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, call, *inputs):
        return call(*inputs, self.linear.weight, self.targets, self.linear.bias, **OPTIONS, return_entropy=True)


def head_of_dtensors():
    """Of 101 ids the first rank has 51. FSDP2 shards the weight once more, and gathers it to one mesh inside its forward."""
    meshes, inputs = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")), head("float64", banned=OPTIONS["banned"])
    scorer = Scorer(torch.nn.Linear(16, 101, dtype=torch.float64))
    scorer.linear.load_state_dict({name: inputs[name] for name in ("weight", "bias")})
    scorer.targets, hidden, found = inputs["targets"], inputs["hidden"].requires_grad_(), []
    for prepare, call in (
        (None, linear_logprob),
        (lambda: parallelize_module(scorer.linear, meshes["tp"], ColwiseParallel()), vocab_parallel_logprob),
        (lambda: fully_shard(scorer, mesh=meshes["dp"]), vocab_parallel_logprob),
    ):
        hidden.grad = None
        scorer.zero_grad()
        if prepare is not None:
            prepare()
        values = scorer(call, hidden)
        sum((x * torch.arange(40)).sum() for x in values).backward()
        grads = [getattr(x.grad, "full_tensor", lambda x=x: x.grad)() for x in (*scorer.parameters(), hidden)]
        found.append([*(x.detach() for x in values), *(x.clone() for x in grads)])
    torch.testing.assert_close(found[1:], found[:1] * 2, **EXACT)
    weight = distribute_tensor(inputs["weight"], meshes["tp"], [Shard(0)])
    for wrong in (scorer.linear.weight, weight.redistribute(placements=[Replicate()])):
        with pytest.raises(ValueError, match=r"weight must be a DTensor with placements \(Shard\(dim=0\),\), got"):
            vocab_parallel_logprob(hidden, wrong, inputs["targets"])
    with pytest.raises(ValueError, match="first_id and group must be left out if weight is a DTensor"):
        vocab_parallel_logprob(hidden, weight, inputs["targets"], first_id=0)


def tensor_parallel_model():
    """transformers' plan shards the attention heads and the vocabulary of a Llama."""
    from transformers import AutoModelForCausalLM

    import quietstar
    from quietstar.testing import tiny_model

    quietstar.register_attention()
    layout = ThoughtLayout.packed(torch.tensor([[3, 3, 7]]), torch.tensor([[2, 4, 3]]), text_length=8)
    ids, targets = torch.randint(3, 60, (2, 1, layout.M), generator=seeded(1))
    folder, found = Path(sys.argv[1], "model"), []
    if dist.get_rank() == 0:
        tiny_model().save_pretrained(folder)
    dist.barrier()
    for plan, call in ((None, linear_logprob), ("auto", vocab_parallel_logprob)):
        options = {"attn_implementation": "quietstar", "dtype": torch.float32, "tp_plan": plan}
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        out = model.get_decoder()(ids, position_ids=layout.position_ids(), use_cache=False, thought_layout=layout)
        logprob = call(out.last_hidden_state[0], model.lm_head.weight, targets[0])
        logprob.sum().backward()
        grads = [getattr(x.grad, "full_tensor", lambda x=x: x.grad)() for x in model.parameters()]
        found.append([logprob.detach(), *grads])
    assert model.lm_head.weight.to_local().shape[0] * 2 == model.config.vocab_size
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def head_refuses():
    """On both ranks, so that neither waits."""
    inputs = head("float32")
    for wrong, options, error in (
        (101, {}, "targets must be ids that one rank's shard has, or -100, got 101"),
        (-2, {}, "targets must be ids that one rank's shard has, or -100, got -2"),
        (64, {"banned": [64]}, "targets must not hold a banned id, got 64"),
        (5, {"banned": [-1]}, r"banned ids must be from 0, got \[-1\]"),
    ):
        targets = inputs["targets"].clone()
        targets[3] = wrong
        with pytest.raises(ValueError, match=f"^vocab_parallel_logprob: {error}$"):
            over_ranks([0, 37, 101])(**inputs | {"targets": targets}, **options)
    with pytest.raises(ValueError, match="first_id, the id of the first row of weight, must be given"):
        vocab_parallel_logprob(inputs["hidden"], inputs["weight"], inputs["targets"])


L, DOCUMENTS = 24, (0, 3, 4, 17)
SLICES = [[[(0, 5)], [(5, 24)]], [[(0, 7), (15, 24)], [(7, 12), (12, 15)]], [[(3, 4), (20, 24)], [(4, 20), (0, 3)]]]


def heads(seed, rows):
    """q, k and v of some rows: H 4, G 2, K 8, E 6."""
    sizes = ((4, 8), (2, 8), (2, 6))
    return [torch.randn(2, h, rows, w, generator=seeded(seed + i), dtype=torch.float64) for i, (h, w) in enumerate(sizes)]


def text_equals_one_process():
    """With windows, soft caps, sinks and documents, on the reference and on the back end of the CPU."""
    whole, grad = [x.requires_grad_() for x in heads(0, L)], torch.randn(2, 4, L, 6, generator=seeded(9), dtype=torch.float64)
    sinks = torch.randn(4, generator=seeded(8), dtype=torch.float64)
    for slices in SLICES:
        mine = torch.cat([torch.arange(*span) for span in slices[dist.get_rank()]])
        for documents in ((0,), DOCUMENTS):
            ids = (torch.arange(L)[:, None] >= torch.tensor(documents)).sum(1).expand(2, L)
            layout = ThoughtLayout.from_documents(ids, 1, 1).text_only()
            for options in ({}, {"window": 4, "softcap": 3.0, "sinks": sinks}, {"backend": "reference"}):
                out = thought_attention(*whole, layout, **options)
                want = torch.autograd.grad(out, whole, grad)
                q, k, v = (x.detach()[:, :, mine].requires_grad_() for x in whole)
                found = text_attention(
                    q, gather_text(k, slices), gather_text(v, slices), slices[dist.get_rank()], documents, **options
                )
                grads = torch.autograd.grad(found, (q, k, v), grad[:, :, mine])
                torch.testing.assert_close(found, out[:, :, mine], **EXACT)
                torch.testing.assert_close(grads, tuple(x[:, :, mine] for x in want), **EXACT)


NODES = [([2, -1, 7], [-1, 0, -1], [2, 1, 3]), ([7, 20, -1, -1], [-1, -1, 1, 1], [1, 2, 3, 1])]  # anchors, parents, lengths


def tree(anchors, parents, lengths):
    return ThoughtLayout.tree(*(torch.tensor([x, x]) for x in (anchors, parents, lengths)), text_length=L)


def branches_equal_one_process():
    """Trees on rows that other ranks have, before and after the rank's own."""
    rank, slices, rows = dist.get_rank(), SLICES[1], [sum(lengths) for *_, lengths in NODES]
    text, own = heads(0, L), [heads(30 * (i + 1), n) for i, n in enumerate(rows)]
    (a0, p0, l0), (a1, p1, l1) = NODES
    whole = [torch.cat(x, 2).requires_grad_() for x in zip(text, *own, strict=True)]
    grad = torch.randn(2, 4, whole[0].shape[2], 6, generator=seeded(9), dtype=torch.float64)
    out = thought_attention(*whole, tree(a0 + a1, p0 + [p if p < 0 else p + len(p0) for p in p1], l0 + l1))
    want = torch.autograd.grad(out, whole, grad)

    mine = torch.cat([torch.arange(*span) for span in slices[rank]])
    place = torch.cat([mine, L + sum(rows[:rank]) + torch.arange(rows[rank])])
    q, k, v = (x.detach()[:, :, place].requires_grad_() for x in whole)
    n = len(mine)
    keys, values = (gather_text(x[:, :, :n], slices) for x in (k, v))
    of_text = text_attention(q[:, :, :n], keys, values, slices[rank])
    keys, values = torch.cat([keys, k[:, :, n:]], 2), torch.cat([values, v[:, :, n:]], 2)
    of_branches = thought_attention(q[:, :, n:], keys, values, tree(*NODES[rank]), query_rows="thoughts")
    found = torch.cat([of_text, of_branches], 2)
    grads = torch.autograd.grad(found, (q, k, v), grad[:, :, place])
    torch.testing.assert_close(found, out[:, :, place], **EXACT)
    torch.testing.assert_close(grads, tuple(x[:, :, place] for x in want), **EXACT)


def text_refuses():
    _, k, _ = heads(0, 5)
    for slices, error in (
        ([[(0, 5)], [(6, 9)]], "slices must cover the text from 0 on once, with rows in each span"),
        ([[(0, 4), (9, 9)], [(4, 9)]], "slices must cover the text from 0 on once, with rows in each span"),
        ([[(0, 5)], []], "slices must cover the text from 0 on once, with rows in each span"),
        ([[(0, 5)]], "slices must have one entry for each of 2 ranks, got 1"),
        ([[(0, 4)], [(4, 8)]], r"x must have shape \[B,G,rows,K\]=\[\?,\?,4,\?\], got"),
    ):
        with pytest.raises(ValueError, match=f"^gather_text: {error}"):
            gather_text(k, slices)


def the_page_runs():
    page = (Path(__file__).parents[2] / "docs/parallel.md").read_text()
    with mock.patch.multiple(dist, init_process_group=mock.DEFAULT, destroy_process_group=mock.DEFAULT):
        exec("".join(re.findall("^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)), {})


CASES = [
    head_equals_the_op, head_errs_as_plain, head_with_a_shard_that_has_no_id, head_with_nan, head_of_dtensors, head_refuses,
    tensor_parallel_model, the_page_runs, text_equals_one_process, branches_equal_one_process, text_refuses,
]  # fmt: skip


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What each case raised, on each rank."""
    from tests.quietstar.run.processes import end, start

    folder = tmp_path_factory.mktemp("ranks")
    running = start([__file__, str(folder)], 2)
    errors = end(running, 240)
    assert [process.returncode for process in running] == [0, 0], errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_two_processes(failures, case):
    assert [found[case.__name__] for found in failures] == ["", ""]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    raised = {}
    for case in CASES:
        try:
            case()
            raised[case.__name__] = ""
        except Exception:
            raised[case.__name__] = traceback.format_exc()
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(raised))
    dist.destroy_process_group()
