"""Tiny models with LoRA adapters, for the tests of adapters in a live model and in checkpoints."""

import peft
import torch

import quietstar
from tests.quietstar.common import step, text

CONFIG = quietstar.ThoughtConfig(thought_tokens=3, lookahead=2, policy_weight=5.0, embedding_scale=1.0)
RANK, ALPHA = 3, 6.0
IDS = text(2, 10)


def lora(**changes):
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**settings, **changes})


def draw(qs, seed=1):
    """Random weights, as after training: new adapters change nothing, and a new mixing head outputs 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in qs.named_parameters():
            if name == "mixing_head.4.weight" or ("lora_B" in name and name.startswith("model.")):
                weight.normal_(0, 0.2, generator=generator)
    return qs


def wrap(model, config=CONFIG, **changes):
    torch.manual_seed(0)
    return draw(quietstar.QuietStar(peft.get_peft_model(model, lora(**changes)), config))


def gradients(qs, **options):
    return step(qs, IDS, seed=4, **options)
