"""Something is held out whatever the data are, and what a model was trained on is never taken for held out."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch

from quietstar.data.held_out import check_held_out, data_config, describe
from quietstar.data.texts import DataConfig, load_data


def words(count, first=0):
    return " ".join(f"w{i}" for i in range(first, first + count))


def write_lines(path, count, first=0):
    path.write_text("".join(json.dumps({"text": words(9, 100 * i)}) + "\n" for i in range(first, first + count)))


def ids(examples):
    return [tuple(x["input_ids"].tolist()) for x in examples]


def contains(whole, part):
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


@pytest.mark.parametrize("tokens", [400, 4000])
def test_blocks_of_one_long_text_are_held_out_and_not_trained_on(byte_tokenizer, tmp_path, tokens):
    (tmp_path / "a.txt").write_text(words(tokens // 5))
    config = DataConfig(data=str(tmp_path / "a.txt"), length=32)
    data = load_data(config, byte_tokenizer, lookahead=2)
    total = len(byte_tokenizer((tmp_path / "a.txt").read_text())["input_ids"]) + 1
    held = sum(map(len, ids(data.held_out)))
    assert len(data.held_out) >= 2 and 0.05 <= held / total <= 0.15
    trained = [x for example in ids(data.train) for x in example]
    assert not any(contains(tuple(trained), block) for block in ids(data.held_out))
    assert total - held - 4 <= len(trained) <= total - held  # a remainder of fewer than J + 2 tokens is dropped
    assert data.texts == 1 and set(data.held_out_texts) == {(tmp_path / "a.txt").read_text()}


@pytest.mark.parametrize(
    "name, lines, pack, held",
    [("a.jsonl", 4, True, 2), ("a.jsonl", 12, True, 2), ("a.jsonl", 12, False, 2), ("a.jsonl", 40, True, 4)],
)
def test_lines_are_held_out_whole(byte_tokenizer, tmp_path, name, lines, pack, held):
    write_lines(tmp_path / name, lines)
    data = load_data(DataConfig(data=str(tmp_path / name), pack=pack, length=64), byte_tokenizer, lookahead=2)
    assert len(data.held_out) == held == len(set(data.held_out_texts))
    for text, example in zip(data.held_out_texts, ids(data.held_out), strict=True):
        assert byte_tokenizer.decode(example).startswith(text[:20])


def test_a_text_that_training_has_too_is_not_held_out(byte_tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "the same text again"}\n' * 30 + '{"text": "another text"}\n')
    data = load_data(DataConfig(data=str(tmp_path / "a.jsonl")), byte_tokenizer, lookahead=2)
    assert data.repeated >= 2 and "the same text again" not in data.held_out_texts


def test_a_split_of_a_hub_data_set_is_held_out(byte_tokenizer, monkeypatch):
    def load_dataset(name, subset, split, streaming):
        return iter([{"text": f"{split} text number {i}"} for i in range(30)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    config = DataConfig(data="some/data", held_out_split="test", held_out=5)
    data = load_data(config, byte_tokenizer, lookahead=2)
    assert len(data.held_out) == 5 and all(text.startswith("test text") for text in data.held_out_texts)
    by_seed = load_data(replace(config, held_out_split=""), byte_tokenizer, lookahead=2)
    assert len(by_seed.held_out) == 3 and all(text.startswith("train text") for text in by_seed.held_out_texts)
    run = describe(config, data, "base")
    assert check_held_out([run], config, data) == []
    with pytest.raises(ValueError, match="3 of the 3 texts held out here"):
        check_held_out([run], replace(config, held_out_split=""), by_seed)


class TestCheck:
    """A run on 60 lines, 5 of them held out."""

    @pytest.fixture
    def config(self, tmp_path):
        write_lines(tmp_path / "a.jsonl", 60)
        return DataConfig(data=str(tmp_path / "a.jsonl"), length=64, held_out=5)

    @pytest.fixture
    def load(self, byte_tokenizer):
        return lambda config: load_data(config, byte_tokenizer, lookahead=2)

    @pytest.fixture
    def run(self, config, load):
        return describe(config, load(config), "base")

    @pytest.mark.parametrize("changes", [{}, {"length": 32}, {"held_out": 3}, {"pack": False}])
    def test_what_the_run_held_out_passes(self, run, config, load, changes):
        config = replace(config, **changes)
        assert check_held_out([run], config, load(config)) == []

    @pytest.mark.parametrize("changes, seen", [({"held_out": 6}, 1), ({"held_out_seed": 1}, None)])
    def test_another_split_is_refused(self, run, config, load, changes, seen):
        config = replace(config, **changes)
        with pytest.raises(ValueError, match=f"{seen or '[1-9]'} of the .* texts held out here .*{next(iter(changes))}"):
            check_held_out([run], config, load(config))

    def test_a_copy_of_the_file_is_the_same_data(self, run, config, load, tmp_path):
        (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
        config = replace(config, data=str(tmp_path / "b.jsonl"))
        assert check_held_out([run], config, load(config)) == []

    def test_a_file_with_more_lines_is_refused(self, run, config, load, tmp_path):
        write_lines(tmp_path / "a.jsonl", 70)
        with pytest.raises(ValueError, match="texts held out here are among those .* has changed since"):
            check_held_out([run], config, load(config))

    def test_other_texts_pass_and_a_mixture_is_refused(self, run, config, load, tmp_path):
        write_lines(tmp_path / "b.jsonl", 60, first=1000)
        other = replace(config, data=str(tmp_path / "b.jsonl"))
        assert check_held_out([run], other, load(other)) == []
        (tmp_path / "b.jsonl").write_text((tmp_path / "a.jsonl").read_text() + (tmp_path / "b.jsonl").read_text())
        with pytest.raises(ValueError, match="texts held out here are among those"):
            check_held_out([run], other, load(other))

    def test_texts_that_are_gone_are_said_to_be_unchecked(self, run, config, load, tmp_path):
        write_lines(tmp_path / "b.jsonl", 60, first=1000)
        (tmp_path / "a.jsonl").unlink()
        other = replace(config, data=str(tmp_path / "b.jsonl"))
        (sentence,) = check_held_out([run], other, load(other))
        assert "can't be read" in sentence and "a.jsonl" in sentence

    def test_questions_in_the_other_form_are_the_same_texts(self, chat_tokenizer, tmp_path):
        lines = [json.dumps({"question": f"{i} and {i}?", "answer": 2 * i}) for i in range(40)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        config = DataConfig(data=str(tmp_path / "a.jsonl"), chat=True)
        data = load_data(config, chat_tokenizer, lookahead=2)
        run = describe(config, data, "base")
        assert check_held_out([run], data_config(run), data) == []
        plain = replace(config, chat=False)
        with pytest.raises(ValueError, match="chat False instead of True"):
            check_held_out([run], plain, load_data(plain, chat_tokenizer, lookahead=2))

    def test_a_run_from_before_there_were_chats(self, run, config, load):
        del run.data["chat"]
        assert data_config(run) == config and check_held_out([run], config, load(config)) == []

    def test_blocks_of_another_length_are_refused(self, load, tmp_path):
        (tmp_path / "a.txt").write_text(words(900))
        config = DataConfig(data=str(tmp_path / "a.txt"), length=32)
        run = describe(config, load(config), "base")
        assert check_held_out([run], config, load(config)) == []
        with pytest.raises(ValueError, match="length 48 instead of 32"):
            check_held_out([run], replace(config, length=48), load(replace(config, length=48)))


def test_the_split_of_many_texts_is_the_one_it_always_was(byte_tokenizer, tmp_path):
    write_lines(tmp_path / "a.jsonl", 40)
    for seed in (0, 1):
        config = DataConfig(data=str(tmp_path / "a.jsonl"), held_out=3, held_out_seed=seed)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
        assert load_data(config, byte_tokenizer, lookahead=2).held_out_texts == [words(9, 100 * i) for i in order[:3]]
