"""The small tokenizer survives saving and loading."""

from transformers import AutoTokenizer

from quietstar_recipes.tasks import small_tokenizer


def test_a_saved_small_tokenizer_loads(tmp_path):
    tokenizer = small_tokenizer("0123")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("3 1 #### 2 <end>")["input_ids"] == tokenizer("3 1 #### 2 <end>")["input_ids"]
    assert again.eos_token_id == 1 and again.pad_token_id == 0
