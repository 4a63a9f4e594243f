"""Files at the door: what is refused, and in which words."""

import json
import os
from types import SimpleNamespace
from typing import Annotated, Any
from unittest.mock import Mock

import msgspec
import pytest

from quietstar.data.rows import chat_text
from quietstar.files.reading import json_lines, read_json, read_utf8, read_yaml, reason_of


class Kept(msgspec.Struct):
    step: Annotated[int, msgspec.Meta(ge=0)]
    files: dict[str, tuple[int, str]] = {}


def test_a_file_becomes_its_type(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"step": 3, "files": {"a": [1, "x"]}, "later": None}))
    assert read_json(tmp_path / "run.json", Kept) == Kept(3, {"a": (1, "x")})
    (tmp_path / "run.yaml").write_text("step: 3\n")
    assert read_yaml(tmp_path / "run.yaml", Kept) == Kept(3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "object, got array"),
        ('{"step": "3"}', r"int, got str - at \$.step"),
        ('{"step": -1}', ">= 0"),
        ("{}", "required field step"),
        ('{"step": 1, "files": {"a": ["1", "x"]}}', r"at \$.files"),
        ('{"step": 1, "x": "\\ud800"}', "half of a pair"),
        ('{"step": 1, "x": ' + 10**5 * "[" + 10**5 * "]" + "}", "nested too deeply"),
    ],
)
def test_other_values_are_refused_by_place(tmp_path, text, says):
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        read_json(file, Kept)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
    (tmp_path / "run.jsonl").write_text('{"step": 1}\n\n' + text)
    with pytest.raises(ValueError, match=says) as error:
        list(json_lines(tmp_path / "run.jsonl", Kept))
    assert "run.jsonl: line 3" in str(error.value)


@pytest.mark.parametrize("read", [read_utf8, read_json, read_yaml])
def test_only_regular_files_are_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    files: list[tuple[Any, str]] = [
        ("/dev/zero", "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "loop", "symbolic links"),
        (tmp_path / "missing", "No such file"),
        ("\0", "no file name"),
        (tmp_path / "\ud800", "no file name"),
    ]
    for file, says in files:
        with pytest.raises(ValueError, match=says):
            read(file)


def test_files_of_settings_have_a_size_limit(tmp_path):
    for read, size in ((read_json, 2**40), (read_yaml, 2**22)):
        with open(tmp_path / "run.json", "wb") as file:
            file.truncate(size)  # takes no space on the disk
        with pytest.raises(ValueError, match="too many"):
            read(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: !!python/object/apply:os.system [ls]", "line 1 has a tag"),
        ("a: &a [x, x]\nb: [*a, *a]", "line 2 has an alias"),
        (1000 * "[" + 1000 * "]", "nested too deeply"),
        ("a: 2001-13-45", "not YAML: month must be in 1..12"),
        ('a: "\\ud800"', "half of a pair"),
        ("? [a]\n: 1", "not YAML"),
    ],
)
def test_yaml_that_is_refused(tmp_path, text, says):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error, said", [(MemoryError(), "MemoryError"), (OSError("\n a\nb"), "a"), (ValueError("a\nb"), "a")])
def test_what_an_error_says_is_never_empty(error, said):
    assert reason_of(error) == said
    tokenizer = SimpleNamespace(chat_template="x", apply_chat_template=Mock(side_effect=error))
    with pytest.raises(ValueError, match=f"the tokenizer's chat template refuses the messages: {said}$"):
        chat_text(tokenizer, [("user", "hello")])
