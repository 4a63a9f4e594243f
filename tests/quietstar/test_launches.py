"""What a layer costs besides its products: operations that would be launches on a GPU, and the bytes that they move."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quietstar import QuietStar, ThoughtConfig
from quietstar_kernels import checks

TEXT = torch.arange(3, 35).view(2, 16)
SHAPE = {"hidden_size": 64, "intermediate_size": 192}  # I = 3 D
# By model: the most launches of a layer and of what is no layer, in a step of a rollout, the packed forward and its backward.
MOST = {
    "llama": {"rollout": (10, 8), "forward": (14, 60), "backward": (25, 64)},
    "qwen3": {"rollout": (10, 8), "forward": (14, 60), "backward": (25, 64)},
}
# The same of bytes for each row and number of its state, in a layer, besides products and attention.
MOST_BYTES = {"llama": {"forward": 48, "backward": 78}, "qwen3": {"forward": 48, "backward": 81}}
PRODUCTS = ("mm", "addmm", "bmm", "thought_attention", "thought_decode", "sample_token", "linear_logprob")


class Launches(TorchDispatchMode):
    """Counts operations that compute something: no views, nothing that only allocates, and no check that a GPU doesn't make."""

    def __init__(self):
        super().__init__()
        self.count = self.bytes = 0

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(checks, "HOST", "none")
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage().data_ptr() for x in given}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known]
        name = func._schema.name.partition("::")[2]
        if func._schema.is_mutable or (made and not name.startswith(("empty", "new_empty", "lift_fresh"))):
            self.count += 1
            if not name.startswith(PRODUCTS):
                self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*given, *made))
        return out

    def cost(self):
        return torch.tensor([self.count, self.bytes])


def cost(call):
    """Launches and bytes."""
    with Launches() as found:
        call()
    return found.cost()


def passes(make, name, layers, T):
    """The cost of a rollout of T tokens, and of forward and backward of the thoughts, for texts that were laid out before."""
    model = make(name, num_hidden_layers=layers, **SHAPE).bfloat16()
    qs = QuietStar(model, ThoughtConfig(thoughts=2, thought_tokens=T, lookahead=4), verify=False)
    qs.graphs = False
    texts = qs.with_tables(qs.texts(TEXT, sequence_ids=torch.arange(2))).to(TEXT.device)  # as in a training loop
    found = {"rollout": cost(lambda: qs.sample(texts, seed=1, greedy=False))}
    thoughts = qs.sample(texts, seed=1, greedy=False)
    texts = texts.with_thoughts(qs.thought_config, thoughts.thought_ids, thoughts.thought_lengths)
    for _ in range(2):  # what attention makes once for a layout is there the second time
        with Launches() as forward:
            loss = qs(texts, seed=1).loss
        found |= {"forward": forward.cost(), "backward": cost(loss.backward)}
        qs.zero_grad()
    rows = TEXT.numel() * (1 + 2 * (T + 5))
    return found, rows


@pytest.mark.parametrize("name", MOST)
def test_launches_and_bytes_do_not_grow(tiny, name, capsys):
    found = {(layers, T): passes(tiny, name, layers, T) for layers in (1, 2) for T in (8, 9)}
    steps = [found[layers, 9][0]["rollout"] - found[layers, 8][0]["rollout"] for layers in (1, 2)]
    (one, rows), (two, _) = found[1, 9], found[2, 9]
    pairs = {"rollout": steps} | {part: (one[part], two[part]) for part in ("forward", "backward")}
    launches = {part: (int((b - a)[0]), int((2 * a - b)[0])) for part, (a, b) in pairs.items()}
    moved = {part: round(int((two[part] - one[part])[1]) / (rows * SHAPE["hidden_size"])) for part in ("forward", "backward")}
    with capsys.disabled():
        layer, fixed = (", ".join(f"{part} {n[i]}" for part, n in launches.items()) for i in (0, 1))
        print(f"\n{name}: launches a layer: {layer}; fixed: {fixed}")
        print(f"bytes a row and D in a layer, besides products: {', '.join(f'{part} {n}' for part, n in moved.items())}")
    assert all(launches[part][i] <= MOST[name][part][i] for part in launches for i in (0, 1)), launches
    assert all(moved[part] <= MOST_BYTES[name][part] for part in moved), moved
