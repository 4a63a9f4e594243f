"""Every type in transformers' causal-LM mapping gives the numbers of ordinary forwards, or is refused with a reason."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig

import quietstar
from quietstar.checkpoints import pretrained
from quietstar.hf.architectures import REFUSED, check_architecture, most_rows
from tests.quietstar.common import assert_same_gradients, step, wrap
from tests.quietstar.hf import all_architectures as everything


@pytest.mark.long
@pytest.mark.parametrize("model_type", everything.TYPES)
def test_every_type_thinks_or_is_refused(model_type):
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=f"model type '{model_type}' cannot think: "):
            check_architecture(SimpleNamespace(model_type=model_type))
    else:
        assert everything.can_think(model_type)


@pytest.mark.parametrize("mark", ["works", "refused"])
def test_tables_of_the_docs(mark):
    """If they differ, run ``python tests/quietstar/hf/all_architectures.py``."""
    page = everything.PAGE.read_text()
    if f"transformers {transformers.__version__.rpartition('.')[0]}" not in page:
        pytest.skip(f"the page is of another version than {transformers.__version__}")
    shown = page.partition(f"<!-- {mark}: begin -->\n")[2].partition(f"\n<!-- {mark}: end -->")[0]
    assert shown == everything.tables()[mark]


SOME = ["llama", "qwen3", "mistral", "gemma3_text", "phi3", "gpt_neox"]  # the last has a share of rotary channels


@pytest.mark.parametrize("types", [SOME, pytest.param(sorted({*everything.TYPES} - {*REFUSED}), marks=pytest.mark.long)])
@pytest.mark.parametrize("scaled", [False, True])
def test_older_names_in_a_config_change_nothing(types, scaled, tmp_path):
    """transformers reads what it wrote of rotary embeddings, for every type, also with the names that ``save_model`` adds."""
    named = []
    for model_type in types:
        config = everything.tiny_config(model_type)
        rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
        for part in [rope] if "rope_theta" in rope else filter(None, rope.values()):
            part |= {"rope_theta": 12345.0} | ({"rope_type": "linear", "factor": 4.0} if scaled else {})
        folder = tmp_path / model_type
        try:
            config.save_pretrained(folder)
            saved = AutoConfig.from_pretrained(folder).get_text_config()
        except StrictDataclassClassValidationError:  # the type takes no such scaling, or its tiny config isn't one to save
            continue
        with pretrained._edited(folder, "config.json") as values:
            for part in (values, values.get("text_config") or {}):
                pretrained._add_older_names(part)
                named += [model_type] * (part.get("rope_theta") == 12345.0 and ("rope_scaling" in part) == scaled)
        loaded = AutoConfig.from_pretrained(folder).get_text_config()
        assert getattr(loaded, "rope_parameters", None) == getattr(saved, "rope_parameters", None), model_type
    assert {"llama", "qwen3", "mistral"} <= {*named} and "gemma3_text" not in named and (types is SOME or len({*named}) > 50)


@pytest.mark.parametrize("model_type", [pytest.param("nemotron", marks=pytest.mark.long), "stablelm"])
def test_a_dropped_layout_reaches_attention_whenever_layers_are_computed_again(model_type):
    """Under gradient checkpointing, and in chunks: the text's layers are computed again after those of every chunk, and must
    not find the last chunk's layout, nor may a plain call."""
    ids = torch.randint(3, 61, (2, 10), generator=torch.Generator().manual_seed(0))
    fields = {"thought_tokens": 2, "lookahead": 2, "policy_weight": 5.0, "embedding_scale": 1.0}
    qs, found = wrap(everything.tiny_model(model_type), spread=0.2, **fields).train(), []
    for qs.anchor_chunk in (None, None, 3):
        found.append(step(qs, ids, seed=1)[1])
        assert_same_gradients(found[-1], found[0])
        qs.gradient_checkpointing_enable()
    plain = qs.model(input_ids=ids).logits
    qs.model.set_attn_implementation("eager")
    torch.testing.assert_close(plain, qs.model(input_ids=ids).logits)


def llama4(**changes):
    config = everything.tiny_config("llama4_text")
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return everything.AutoModelForCausalLM.from_config(config).eval()


def test_chunked_attention_works_inside_one_chunk_and_is_refused_across_chunks():
    thoughts = quietstar.ThoughtConfig(thoughts=1, thought_tokens=2, lookahead=2)
    qs = quietstar.QuietStar(llama4(attention_chunk_size=20), thoughts)
    assert qs(torch.randint(3, 61, (1, 15))).loss.isfinite()
    with pytest.raises(ValueError, match="may take 2. positions and attention is cut into chunks of 20"):
        qs(torch.randint(3, 61, (1, 20)))


def test_attention_scaled_by_row_index_is_refused_where_it_would_differ():
    qs = quietstar.QuietStar(llama4(floor_scale=40), quietstar.ThoughtConfig(thoughts=1, thought_tokens=2, lookahead=2))
    with pytest.raises(ValueError, match="scales attention by row index from row 39 on, got 60 rows"):
        qs(torch.randint(3, 61, (1, 10)))
    # Steps of one row are limited by their positions: those of the text and of a thought's T + 2 rows.
    few = quietstar.QuietStar(llama4(floor_scale=12), qs.thought_config, verify=False)
    assert few.generate(torch.randint(3, 61, (1, 6)), max_new_tokens=2, eos_token_id=None).shape == (1, 8)
    with pytest.raises(ValueError, match="scales attention by row index from row 11 on, got 12 rows"):
        few.generate(torch.randint(3, 61, (1, 6)), max_new_tokens=3, eos_token_id=None)


@pytest.mark.parametrize("limit", [{"attention_chunk_size": 20}, {"floor_scale": 21}], ids=str)
def test_memory_for_a_long_answer_is_no_reason_to_refuse_a_short_one(limit):
    config = quietstar.ThoughtConfig(thoughts=1, thought_tokens=2, lookahead=2)
    qs = quietstar.QuietStar(llama4(**limit), config, verify=False)
    ids, ends = torch.randint(3, 61, (1, 8)), list(range(61))
    assert qs.generate(ids, max_new_tokens=60, eos_token_id=ends, pad_token_id=0).shape == (1, 9)
    assert most_rows(qs.model) == 20
    for module in qs.model.modules():
        module.attn_temperature_tuning = False
    assert most_rows(qs.model) == (20 if "attention_chunk_size" in limit else qs.model.config.attention_chunk_size)
