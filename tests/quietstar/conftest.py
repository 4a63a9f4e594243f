"""Tiny random models of every listed architecture, small enough to look at every row; and one that solves problems."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from quietstar import QuietStar, ThoughtConfig

logging.disable_progress_bar()  # of transformers, whose saves show one; what ours print is tested

SMALL = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATED_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 12}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1, "num_local_experts": 0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# A window of 7 is crossed by the texts of these tests, inside the text and inside thoughts.
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 7, "use_sliding_window": True},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 7, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
    "gpt_neox": {},
    "olmo2": {},
    "phi3": {"sliding_window": 7},
    "mixtral": EXPERTS,
    "gpt_oss": EXPERTS | {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "phi": {},
    "qwen3_5_text": GATED_DELTA | {"layer_types": ["linear_attention", "full_attention"]},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 96},
}


# What `make test` runs of them; the others are in `make test-long`.
FEW = ("llama", "qwen2", "gemma2", "gpt2", "gpt_oss")


def make_model(name, seed=0, **changes):
    """A model whose weights are drawn wide, so that a wrong mask or position shows in its logits."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **{**SMALL, **ARCHITECTURES[name], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.5 if parameter.shape[1] == 1 else 0.15)  # convolutions have few weights
    return model.eval()


@pytest.fixture(scope="session")
def tiny():
    """``tiny(name, seed=0, **config changes)`` makes a model; see ``ARCHITECTURES`` for the names."""
    return make_model


@pytest.fixture(scope="session")
def thinker():
    """``thinker(name or model, **fields of the config)``: a wrapper whose mixing head and embeddings are as after training."""

    def make(model="llama", tokenizer=None, **fields):
        model = make_model(model) if isinstance(model, str) else model
        usual = {"thoughts": 2, "thought_tokens": 3, "lookahead": 2, "policy_weight": 10.0}
        qs = QuietStar(model, ThoughtConfig(**{**usual, **fields}), tokenizer, verify=False)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            qs.mixing_head[4].weight.normal_(0, 0.3, generator=generator)
            qs.start_embedding.normal_(0, 0.01, generator=generator)
            qs.end_embedding.normal_(0, 0.01, generator=generator)
        return qs.train()

    return make


def make_byte_tokenizer():
    letters = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def sentence_pieces(*pieces):
    """As SentencePiece's with fallback to bytes: a token for each of the 256 bytes, <unk>, and these."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "<unk>", *pieces]
    bpe = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(names)}, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>" if "<s>" in pieces else None, unk_token="<unk>")


@pytest.fixture
def byte_tokenizer():
    """A token for each of the 256 bytes, from id 1, and <end>, 0."""
    return make_byte_tokenizer()


@pytest.fixture
def chat_tokenizer(byte_tokenizer):
    """The same with a chat template. Template and tokenizer both begin with <end>: where both do, it is there twice."""
    byte_tokenizer.chat_template = (
        "{{ eos_token }}{% for x in messages %}{% if x.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "[{{ x.role }}]{{ x.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    start = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    byte_tokenizer.backend_tokenizer.post_processor = start
    return byte_tokenizer


@pytest.fixture
def model_folder(tiny, byte_tokenizer, tmp_path):
    """The folder ``model``, with a plain language model of bytes, beside a text file."""
    tiny("llama", vocab_size=257, hidden_size=32, intermediate_size=48).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(f"{i} lines of text" for i in range(50)))
    return tmp_path / "model"


@pytest.fixture
def base(tiny, tmp_path):
    """The folder of a base model."""
    tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="session")
def solver():
    """``(model, task)``: digit sums, about half of them right when sampled; copy the model before changing it."""
    # Here, since most tests need none of it.
    from quietstar_recipes.common.models import small_model
    from quietstar_recipes.common.training import SFTConfig, sft
    from quietstar_recipes.tasks import Addition

    task = Addition(1)
    model = small_model(task, width=64, heads=2, positions=128)
    rows = task.sample(600, "train", torch.Generator().manual_seed(0))
    examples = [(row.hinted_ids if i % 3 == 0 else row.prompt_ids, task.completion_ids(row)) for i, row in enumerate(rows)]
    sft(model, examples, 120, SFTConfig(learning_rate=3e-3, batch_tokens=600))
    return model.eval(), task


@pytest.fixture(params=[pytest.param(name, marks=() if name in FEW else pytest.mark.long) for name in ARCHITECTURES])
def architecture(request):
    return request.param
