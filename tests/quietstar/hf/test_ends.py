"""A text ends with what training wrote and with what the model's configs say, whatever continues it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from quietstar import QuietStar, ThoughtConfig
from quietstar.data.texts import tokenize
from quietstar.evaluation.questions.answers import continue_texts
from quietstar.hf.ends import end_ids
from quietstar.thinking.text_thoughts import Marks
from quietstar_recipes.common.sampling import rollout
from quietstar_recipes.tasks import Addition
from tests.quietstar.conftest import make_byte_tokenizer

ENDS = ("<|eot|>", "<|im_end|>", "<|call|>")
TEMPLATE = "{% for x in messages %}{{ x.role }}\n{{ x.content }}END\n{% endfor %}"
# Ends of the generation config, and of the chat template.
SOURCES = [(None, ENDS[1]), (ENDS[:1], None), (ENDS[::-1], ENDS[1])]


@pytest.fixture(scope="module")
def tokenizer():
    made = make_byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(ENDS)})
    return made


@pytest.fixture(scope="module")
def model():
    """A model in which a token says which comes next: see ``writes``."""
    sizes = {"hidden_size": 264, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=264, **sizes, eos_token_id=None, bos_token_id=None)).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(264))
    return model


def writes(model, ids):
    """After the first of these tokens come the others."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for token, after in zip(ids, [*ids[1:], ids[-1]], strict=True):
            model.lm_head.weight[after, token] = 1


@pytest.mark.parametrize("own, turn", SOURCES)
def test_all_wait_for_all_ends(model, tokenizer, tmp_path, own, turn):
    tokenizer.chat_template = turn and TEMPLATE.replace("END", turn)
    ids = dict(zip(ENDS, tokenizer.convert_tokens_to_ids(ENDS), strict=True))
    own_ids = own and [ids[x] for x in own]
    model.generation_config = GenerationConfig(eos_token_id=own_ids[0] if own and len(own) == 1 else own_ids)
    wanted = {tokenizer.eos_token_id, *(ids[x] for x in {*(own or ()), turn} - {None})}
    qs = QuietStar(model, ThoughtConfig(thought_tokens=2, lookahead=2), tokenizer, verify=False).eval()
    qs.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(end_ids(tokenizer, model)) == set(end_ids(tokenizer, saved)) == wanted
    assert set(end_ids(None, saved)) == wanted and {int(x[-1]) for x in tokenize(["text"], tokenizer)} <= wanted
    written = ThoughtConfig(preset="rlp", thought_start="<think>", thought_end="</think>")
    assert set(Marks.of(written, tokenizer, model).stops) == wanted
    task, prompt = Addition(1, tokenizer), tokenizer("a")["input_ids"]
    for end in (tokenizer.eos_token_id, *ids.values()):
        after = [*tokenizer("bc")["input_ids"], end, *tokenizer("de")["input_ids"]]
        for one in (model, saved):
            writes(one, prompt + after)
        whole = after[: 3 if end in wanted else 5]
        plain = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 7}
        tensor = torch.tensor([prompt])
        config = GenerationConfig(**plain)
        for out in (
            qs.generate(tensor, think="never", **plain),
            qs.generate(tensor, think="never", generation_config=config),
            qs.generate(tensor, generation_config=config),
            saved.generate(tensor, **plain),
        ):
            assert out[0, 1:].tolist() == whole
        assert qs.generate(tensor, eos_token_id=None, **plain).shape == (1, 6)
        padded = continue_texts(qs, [prompt, tokenizer("e")["input_ids"]], 5, (), think="never", do_sample=False)
        assert padded == ["bc" if end in wanted else "bcde", "eeeee"]
        ((completion,),) = rollout(model, task, [prompt], temperature=0.0, max_new=5)
        assert completion.ids == whole and task.text(completion.ids) == tokenizer.decode(after[:2] if end in wanted else after)


def test_an_end_of_the_config_must_be_special(model, tokenizer):
    """``LlamaConfig()`` says 2, whatever that is."""
    model.generation_config, tokenizer.chat_template = GenerationConfig(), None
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    for token, more in ((2, []), (eot, [eot]), ([eot, 2], [eot])):
        model.config.eos_token_id = token
        assert end_ids(tokenizer, model) == [tokenizer.eos_token_id, *more]
    model.config.eos_token_id = None
