"""What many of these tests do: texts, a step with its gradients, and a short run."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quietstar import QuietStar, ThoughtConfig
from quietstar.config import TrainConfig
from quietstar.training import thought_loss, train

TIMES = {"seconds", "tokens_per_second", "thoughts_per_second"}


def text(B=2, L=12, seed=0):
    return torch.randint(3, 61, (B, L), generator=torch.Generator().manual_seed(seed))


def texts_of(lengths, seed=0):
    """Examples of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 61, (length,), generator=generator)} for length in lengths]


def wrap(model, tokenizer=None, spread=0.5, **fields):
    """A wrapper with these fields of its config and, as after training, a mixing head that makes something of thoughts."""
    qs = QuietStar(model, ThoughtConfig(**fields), tokenizer, verify=False)
    torch.nn.init.normal_(qs.mixing_head[4].weight, 0, spread, generator=torch.Generator().manual_seed(1))
    return qs


def step(qs, *inputs, **options):
    """The output of a forward, and the gradients of its loss by name."""
    qs.zero_grad()
    out = qs(*inputs, **options)
    out.loss.backward()
    return out, gradients(qs)


def gradients(qs):
    return {name: weight.grad.clone() for name, weight in qs.named_parameters() if weight.grad is not None}


def assert_same_gradients(got, want, bound=1e-5):
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] - want[name]).norm() <= bound * want[name].norm(), name


def sequential_logits(model, layout, ids):
    """[B,M,V] from ordinary forwards: the text alone, and each thought after its text prefix; anchors are the first text's."""
    text, thoughts = ids[:, : layout.L], ids[:, layout.L :].unflatten(1, (layout.P, layout.N, layout.S))
    logits = [model(input_ids=text, use_cache=False).logits]
    for p, anchor in enumerate(layout.anchor[0].tolist()):
        for n in range(layout.N):
            prefix = torch.cat([text[:, : anchor + 1], thoughts[:, p, n]], 1)
            logits.append(model(input_ids=prefix, use_cache=False).logits[:, anchor + 1 :])
    return torch.cat(logits, 1)


def drawn_from(qs, text, think):
    """Log-probabilities [V] of the token after the text, as generation has them."""
    ids = torch.tensor([text])
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "eos_token_id": None}
    out = qs.generate(ids, torch.ones_like(ids), max_new_tokens=1, think=think, pad_token_id=0, **options)
    return out.logits[0][0].log_softmax(-1)


def kept_for_backward(qs, *inputs, **options):
    """Bytes that a forward keeps for its backward, without the weights."""
    weights = {x.untyped_storage().data_ptr() for x in [*qs.parameters(), *qs.buffers()]}
    sizes = {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = (storage.nbytes(), x)  # alive, so that no other gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = qs(*inputs, **options)
    assert out.loss.requires_grad
    return sum(size for size, _ in sizes.values())


class Peak(TorchDispatchMode):
    """``bytes``: the most that tensors of more than 4 KiB took at once, those that were there before left out."""

    def __init__(self, *before):
        super().__init__()
        self.before, self.alive, self.bytes = {StorageWeakRef(x.untyped_storage()) for x in before}, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        storages = [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.alive |= {StorageWeakRef(x): x.nbytes() for x in storages if x.nbytes() > 4096}
        self.alive = {x: size for x, size in self.alive.items() if x not in self.before and not x.expired()}
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return result


def short_run(qs, data, out, resume=None, loss=thought_loss, evaluate=None, evaluate_first=False, **changes):
    """The metrics of a few steps, without times."""
    settings = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "warmup": 1, "save_every": 2, **changes}
    config = TrainConfig(out=str(out), **settings)
    options = {"resume": resume, "evaluate": evaluate, "evaluate_first": evaluate_first}
    return without_times(train(qs, data, config, loss, **options, progress=False))


def without_times(lines):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
