"""Group RL in TRL: a prompt runs once with all its completions, instead of once for each.

``SharedPrompts`` before TRL's trainer in the bases is all that changes. A small random model writes numbers and is rewarded for
even ones, in both trainers: they log the same rewards and end with the same weights.

    pip install trl
    python examples/shared_prompts.py
"""

import tempfile
import time
import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from quietstar import SharedPrompts


class SharedGRPOTrainer(SharedPrompts, GRPOTrainer):
    pass


PROMPT, NEW, GROUP = 256, 32, 8  # tokens of a prompt and of a completion; completions of each prompt
STEPS, UPDATES = 2, 4  # prompts; how often the completions of one are learnt from


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each number from 0 to 99."""
    words = Tokenizer(models.WordLevel({"<end>": 100, "<pad>": 101} | {str(i): i for i in range(100)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=102, eos_token_id=100, pad_token_id=101, bos_token_id=None, **sizes))


def even(completion_ids: list[list[int]], **_) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def run(trainer_class: type[GRPOTrainer], folder: str) -> tuple[list[float], torch.Tensor, float]:
    """Rewards, all weights in the end, and the seconds of training."""
    config = GRPOConfig(
        folder, per_device_train_batch_size=GROUP, num_generations=GROUP, num_iterations=UPDATES,
        max_completion_length=NEW, max_steps=STEPS * UPDATES, optim="sgd", learning_rate=0.1, logging_steps=UPDATES, seed=0,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
    )  # fmt: skip
    prompts = [" ".join(str((7 * i + j) % 100) for j in range(PROMPT)) for i in range(8)]
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = trainer_class(make_model(), even, config, data, processing_class=make_tokenizer())
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    return rewards, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), seconds


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)  # what libraries say to each other's authors
    found = {}
    for trainer_class in (GRPOTrainer, SharedGRPOTrainer):
        with tempfile.TemporaryDirectory() as folder:
            rewards, weights, seconds = found[trainer_class] = run(trainer_class, folder)
        print(f"{trainer_class.__name__}: rewards {', '.join(f'{x:.3f}' for x in rewards)}, {seconds:.1f} s")
    (_, stock, slow), (_, shared, fast) = found.values()
    print(f"{slow / fast:.1f} times as fast; weights differ by at most {float((stock - shared).abs().max()):.0e}")


if __name__ == "__main__":
    main()
