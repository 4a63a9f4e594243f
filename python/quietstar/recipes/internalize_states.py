"""Thoughts as states instead of words (ICoT-KD, arXiv 2311.01460): one per layer from a teacher, and the models using them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import PreTrainedModel

from quietstar.recipes.common.logprobs import padded, positions

MIXTURE_TEMPERATURE = 0.05  # as in the published code


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a causal language model. Raises ValueError if it has no module list that holds exactly them."""
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ValueError(f"internalize: {type(model).__name__} has no list of its {wanted} layers to write states into")


def diagonal(hidden_states: tuple[Tensor, ...], first: Tensor, last: Tensor) -> Tensor:
    """The teacher's states [B,layers,D]: the input of layer l at a position that moves from ``first`` to ``last`` as l grows.

    Each row has its own positions, since chains differ in length. States are normalised without parameters.

    Args:
        hidden_states: [B,L,D], the input of each layer and one more, as ``output_hidden_states`` returns them.
        first, last: int64 [B], positions of the separators before and after the chain.
    """
    layers = len(hidden_states) - 1
    share = torch.linspace(0, 1, layers, dtype=torch.float64, device=first.device)
    place = (first[:, None] + share * (last - first)[:, None]).round().long()  # [B,layers]
    rows = torch.arange(len(first), device=first.device)
    states = torch.stack([hidden_states[l][rows, place[:, l]] for l in range(layers)], 1)
    return layer_norm(states, states.shape[-1:])


@contextmanager
def writing(model: PreTrainedModel, place: int, state: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """In this context, the input of layer l at column ``place`` is ``state(l, its previous value)``, [B,D].

    Cached decoding, one token at a time, is left alone.
    """

    def before(l: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] == 1:
                return None
            new = state(l, hidden[:, place]).to(hidden.dtype)
            hidden = torch.cat([hidden[:, :place], new[:, None], hidden[:, place + 1 :]], 1)
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return hook

    handles = [layer.register_forward_pre_hook(before(l), with_kwargs=True) for l, layer in enumerate(decoder_layers(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def width(model: PreTrainedModel) -> int:
    """D, the size of a hidden state."""
    return model.config.get_text_config().hidden_size


def perceptrons(model: PreTrainedModel, inputs: int) -> nn.ModuleList:
    """One two-layer perceptron per layer, from ``inputs`` * D over 4 D to D."""
    D, layers = width(model), len(decoder_layers(model))
    return nn.ModuleList(nn.Sequential(nn.Linear(inputs * D, 4 * D), nn.ReLU(), nn.Linear(4 * D, D)) for _ in range(layers))


class Student(nn.Module):
    """A language model into which one state per layer is written, at the separator after the prompt."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self.perceptrons = model, perceptrons(model, 1)
        self.to(model.device, model.dtype)

    def reading(self, states: Tensor, place: int) -> Any:
        """In this context, the model reads ``states`` [B,layers,D] at column ``place``."""
        return writing(self.model, place, lambda l, _: self.perceptrons[l](states[:, l]))


class Emulator(nn.Module):
    """Predicts the teacher's states from the prompt: a language model with a mixture, and a memory that runs over the layers.

    Args:
        components: M, components of the mixture; 1 if there is one way to reason.
    """

    def __init__(self, model: PreTrainedModel, components: int = 1):
        super().__init__()
        self.model, self.perceptrons = model, perceptrons(model, 2)
        D = width(model)
        self.mixture = nn.Embedding(components, D)
        self.memory = nn.LSTMCell(D, D)
        self.query, self.key = nn.Linear(D, D), nn.Linear(D, D)
        self.write = nn.Linear(2 * D, D)
        self.to(model.device, model.dtype)

    def forward(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The states [B,layers,D] predicted at the last token of each prompt."""
        ids, mask = (x.to(self.model.device) for x in padded(prompts, left=True))
        states: list[Tensor] = []
        keys: list[Tensor] = []
        memory: tuple[Tensor, Tensor] | None = None
        context: Tensor | None = None

        def state(l: int, hidden: Tensor) -> Tensor:
            """Predict the state of layer l, and return what to write there for later layers to read."""
            nonlocal memory, context
            component = (hidden @ self.mixture.weight.T / MIXTURE_TEMPERATURE).softmax(-1) @ self.mixture.weight
            states.append(self.perceptrons[l](torch.cat([hidden, component], -1)))
            context = torch.zeros_like(hidden) if context is None else context
            memory = self.memory(states[-1] + context, memory)
            if keys:
                earlier = torch.stack(keys, 1)  # [B,l,D]
                weights = (earlier @ self.query(memory[0])[..., None]).softmax(1)
                context = (weights * earlier).sum(1)
            keys.append(self.key(memory[0]))
            return self.write(torch.cat([memory[0], context], -1))

        with writing(self.model, ids.shape[1] - 1, state):
            self.model.base_model(
                input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask, ids.shape[1]), use_cache=False
            )
        return torch.stack(states, 1)


def emulation_loss(states: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance, summed over layers and width, averaged over rows; both are [B,layers,D]."""
    return 0.5 * (targets - states).square().sum((1, 2)).mean()
