"""A run's folder stands for its newest checkpoint, a recipe's for its best; a folder that is not there is said at once."""

import shutil

import pytest

from quietstar import QuietStar, ThoughtConfig
from quietstar.checkpoints import pretrained
from quietstar.checkpoints.places import checkpoint_of, run_of


@pytest.fixture
def runs(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (2, 10):
        qs = QuietStar(tiny("llama"), ThoughtConfig(thoughts=step, thought_tokens=2, lookahead=2))
        qs.save_pretrained(f"runs/first/checkpoints/step-{step:06d}")
        (tmp_path / f"runs/first/checkpoints/step-{step:06d}/run.json").write_text(f'{{"step": {step}}}')
    tiny("llama").save_pretrained("runs/star/round-01")
    (tmp_path / "runs" / "star" / "best").symlink_to("round-01")
    tiny("llama").save_pretrained("runs/fast/model")
    return tmp_path


def test_a_run_stands_for_its_newest_checkpoint(runs):
    assert QuietStar.from_pretrained("runs/first").thought_config.thoughts == 10
    assert QuietStar.from_pretrained(runs / "runs" / "first").thought_config.thoughts == 10
    assert QuietStar.from_pretrained("runs/first/checkpoints/step-000002").thought_config.thoughts == 2
    assert pretrained.load_model("runs/first").config.model_type == "llama"
    assert run_of("runs/first") == run_of("runs/first/checkpoints/step-000002") and run_of("runs/first").name == "first"
    assert run_of("runs/star") is None


def test_a_copy_under_another_steps_name_is_passed_over(runs):
    shutil.copytree("runs/first/checkpoints/step-000002", "runs/first/checkpoints/step-000011")
    with pytest.warns(match="step-000011: passed over: its run.json says step 2"):
        assert QuietStar.from_pretrained("runs/first").thought_config.thoughts == 10
    assert QuietStar.from_pretrained("runs/first/checkpoints/step-000011").thought_config.thoughts == 2  # asked for by name


def test_a_recipes_run_stands_for_its_best_round_or_its_result(runs):
    assert checkpoint_of("runs/star") == "runs/star/best" and checkpoint_of("runs/fast") == "runs/fast/model"
    assert checkpoint_of("runs/star/round-01") == "runs/star/round-01"
    for name in ("runs/star", "runs/fast"):
        assert pretrained.load_model(name).config.model_type == "llama"


@pytest.mark.parametrize("name", ["runs/nope", "./nope", "/no/such/folder", "a/b/c", "~/nope"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(runs, monkeypatch, name):
    monkeypatch.setattr("quietstar.checkpoints.contents.cached_file", lambda *_, **__: pytest.fail("the hub was asked"))
    for load in (QuietStar.from_pretrained, pretrained.load_model, pretrained.load_tokenizer, pretrained.load_config):
        with pytest.raises(ValueError, match=f"^{name}: there is no such folder$"):
            load(name)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B"])
def test_names_on_the_hub_stay_as_they_are(runs, name):
    assert checkpoint_of(name) == name
