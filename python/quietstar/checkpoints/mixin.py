"""Saving and loading as methods of the wrapper."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.arguments.values import FLOATS, file_path, flag, integer, mapping, number, refusal, tensor
from quietstar.checkpoints import native, official
from quietstar.checkpoints.contents import Contents, TrainedOn
from quietstar.checkpoints.places import checkpoint_of

if TYPE_CHECKING:
    from typing_extensions import Self


class CheckpointMixin(nn.Module):
    """For a module with a ``model``, ``thought_config``, ``tokenizer`` and ``base``."""

    model: PreTrainedModel
    thought_config: Any
    tokenizer: Any
    base: Any
    trained_on: tuple[TrainedOn, ...] = ()

    def contents(self) -> Contents:
        """What a checkpoint of this model holds; the tensors are the parameters themselves."""
        tensors: dict[str, Tensor] = {name: x for name, x in self.named_parameters() if not name.startswith("model.")}
        return Contents(self.model, self.thought_config, self.tokenizer, tensors, self.base, self.trained_on)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write a checkpoint that ``AutoModelForCausalLM`` loads, with the thought parts beside it; renamed into place.

        Of a model with adapters, those alone are written, as peft does it. Other files of the folder are kept, except the
        weights of another checkpoint. Raises ValueError where weights of the base were trained, which would be lost.
        """
        native.save(self.contents(), file_path("directory", directory))

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, verify: bool = True, base: PreTrainedModel | str | None = None, **kwargs: Any
    ) -> Self:
        """Load what ``save_pretrained`` wrote, or a published checkpoint, from a folder or a hub name; of a run's folder, the
        newest checkpoint.

        Nothing is initialised anew. A published checkpoint doesn't say how long its thoughts are: ``thought_tokens`` is taken
        from its ``max_thoughts``, and ``qs.thought_config`` may be replaced.

        Args:
            verify: compare the SHA-256 of weights, config, vocabulary and thought parts with those that were saved, which takes
                0.6 seconds for a gigabyte, and check that packed rows equal an ordinary forward, once per architecture.
                False skips both, and loads a checkpoint whose config was edited; sizes of weights are compared all the same.
            base: for a checkpoint of adapters, what they belong to: a model, which gets them, a folder or a hub name; default
                the one that the checkpoint names.
            kwargs: for ``AutoModelForCausalLM.from_pretrained``; dtype defaults to the saved one.

        Raises:
            ValueError: a checkpoint that is damaged, foreign, pickled or of another model or vocabulary; adapters of another
                base.
        """
        path = checkpoint_of(file_path("path", path))
        contents = native.load(path, base, flag("verify", verify), **kwargs)
        try:
            qs = cls(contents.model, contents.config, contents.tokenizer, verify=verify)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        native.restore(qs.contents().tensors, contents.tensors, path)
        qs.trained_on = contents.trained_on
        return qs

    def save_official(self, directory: str | os.PathLike, max_shard_size: int | str = "5GB") -> None:
        """Write a checkpoint in the published format, which the published code and ``from_pretrained`` load.

        Args:
            max_shard_size: of a weights file, in bytes or as "5GB"; larger ones are cut into shards with an index.

        Raises:
            ValueError: not a Mistral, or a model that mixes log-probabilities: the published code knows neither.
        """
        if not isinstance(max_shard_size, str):
            max_shard_size = integer("max_shard_size", max_shard_size, 1)
        elif not re.fullmatch(r"\d+(\.\d+)? ?[KMGT]B", max_shard_size):
            raise refusal("max_shard_size", "bytes, or text such as 5GB", max_shard_size)
        official.save(self.contents(), file_path("directory", directory), max_shard_size)

    def load_official_state_dict(self, state: Mapping[str, Tensor], embedding_scale: float = 100.0) -> None:
        """Load a published checkpoint's tensors by their published names, all of them or none.

        Base weights, ``talk_head.0.{0,2,4}.*``, ``start_embedding`` and ``end_embedding`` [2,D] (row 0 is used).

        Args:
            embedding_scale: the published model's factor from stored to effective vector.

        Raises:
            ValueError: a name that is missing or unknown, or a shape that differs.
        """
        if not mapping("state", state):
            raise refusal("state", "a published checkpoint's tensors", state)
        for name, x in state.items():
            tensor(f"state: {name}", x, "...", {}, dtypes=FLOATS)
        embedding_scale = number("embedding_scale", embedding_scale, "above 0", above=0)
        official.load_state_dict(self.contents(), state, embedding_scale)
