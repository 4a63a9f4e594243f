"""TRL's trainers for tests: quick ones that write nothing, their twins with shared prompts, and a tokenizer of numbers."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("trl", minversion="1.16")  # Python 3.10 has an older one

from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from quietstar import SharedDistillation, SharedPrompts

V, END = 61, 2
USUAL = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
USUAL |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 2, "num_generations": 4}


class SharedGRPO(SharedPrompts, GRPOTrainer):
    pass


class SharedRLOO(SharedPrompts, RLOOTrainer):
    pass


class SharedDistilling(SharedDistillation, DistillationTrainer):
    pass


PAIRS = {GRPOTrainer: SharedGRPO, RLOOTrainer: SharedRLOO, DistillationTrainer: SharedDistilling}


def config_of(cls, folder, **options):
    if issubclass(cls, DistillationTrainer):
        usual = {name: value for name, value in USUAL.items() if name != "num_generations"}
        return DistillationConfig(str(folder / "run"), **usual | options)
    return (RLOOConfig if issubclass(cls, RLOOTrainer) else GRPOConfig)(str(folder / "run"), **USUAL | options)


def number_tokenizer():
    """A token for each number from 3 to V - 1."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<end>": END, **{str(i): i for i in range(3, V)}}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", bos_token="<bos>")


def weights_of(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def sum_of_ids(completion_ids, **_):
    """A reward."""
    return [sum(x % 7 for x in ids) / len(ids) for ids in completion_ids]
