"""Wrong command lines and damaged files: a sentence and an exit code, never a traceback or a hang."""

import gzip
import shutil
import traceback
from collections import Counter

import pytest

from quietstar.cli.errors import DATA, RUNTIME, USAGE, UsageError
from quietstar.cli.main import COMMANDS, main
from quietstar.cli.options import read_config
from quietstar.data.texts import DataConfig, read_texts
from quietstar.data.thoughts import ThoughtRecord, open_records
from quietstar.evaluation.questions.reading import read_questions
from quietstar_recipes.tasks import GSM8K, CommonsenseQA
from tests.limits import Hang, limits
from tests.quietstar.cli import wrong_commands
from tests.quietstar.conftest import make_byte_tokenizer

pytest.importorskip("pyarrow")  # thoughts in parquet are among the files

PATIENCE = 6  # a command takes seconds even if nothing is wrong, and others may take most of the machine
CODES = (0, 2, 3, 4)
BARS = ("it/s", "s/it", " ETA ")
# What needs no run of a recipe, or of anything: quick enough for every `make test`.
CORE = [name for name in wrong_commands.GOOD if "task" not in wrong_commands.GOOD[name] and name != "fast"]
WHOLE = [name for name in wrong_commands.READ if name.split("/")[0] in ("model", "thinker", "text.jsonl", "questions.jsonl")]


@pytest.fixture(scope="module")
def template(tiny, tmp_path_factory):
    """A folder of models and data."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = tiny("llama", vocab_size=257, hidden_size=32, intermediate_size=48)
        wrong_commands.make_template(folder, model, make_byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def with_runs(template, tmp_path_factory):
    """The same with runs and exports."""

    def run_well(arguments):
        assert main(arguments) == 0, arguments

    folder = shutil.copytree(template, tmp_path_factory.mktemp("runs") / "template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        wrong_commands.make_runs(run_well)
    return folder


def outcome(attack, capfd):
    """The exit code of an attack, and what broke the rule, or an empty text."""
    capfd.readouterr()
    try:
        with limits(patience=PATIENCE):
            code = main(attack.arguments)
    except SystemExit as end:
        code = end.code
    except (Exception, Hang) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename.rpartition('site-packages/')[2]}:{place.lineno}"
        return None, f"{type(error).__name__}: {str(error)[:150]} ({where})"
    err = capfd.readouterr().err.replace("\r", "\n")
    lines = [line for line in err.splitlines() if line.strip() and not any(bar in line for bar in BARS)]
    sentences = sum(line.startswith("quietstar: ") for line in lines)
    boxed = any(line.startswith("╭") for line in lines)  # a usage error, by tyro
    if code not in CODES:
        return code, f"exit code {code}"
    if "Traceback" in err:
        return code, f"a traceback: {err[-300:]}"
    if code and sentences + boxed != 1:
        return code, f"{sentences} sentences: {err[-300:]!r}"
    return code, ""


@pytest.mark.long
@pytest.mark.parametrize("command", wrong_commands.GOOD)
def test_the_commands_work_before_they_are_attacked(command, with_runs, tmp_path, monkeypatch, capfd):
    """Apart from those that need a model that solves problems; they get as far as the first ones."""
    wrong_commands.make_folder(with_runs, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    code, wrong = outcome(wrong_commands.Attack(wrong_commands.line_of(command, wrong_commands.GOOD[command])), capfd)
    assert code in ((0, 3) if command in ("vstar", "score", "solve") else (0,)) and not wrong, wrong


def run(kind, attacks, template, tmp_path, monkeypatch, capfd, record_property):
    codes, broken = Counter(), []
    for i, attack in enumerate(attacks):
        folder = tmp_path / str(i)
        wrong_commands.make_folder(template, folder)
        monkeypatch.chdir(folder)
        if attack.damage is not None:
            (folder / attack.damage[0]).write_bytes(attack.damage[1])
        code, wrong = outcome(attack, capfd)
        codes[code] += 1
        if wrong:
            broken.append(f"{attack}\n    {wrong}")
    ended = {f"ended with code {code}": codes[code] for code in (0, USAGE, DATA, RUNTIME)}
    record_property("counts", [kind, {"tried": len(attacks), **ended, "broke the rule": len(broken)}])
    assert not broken, f"{len(broken)} of {len(attacks)} broke the rule:\n" + "\n".join(broken)


@pytest.mark.parametrize("number", range(2 * len(CORE)))
def test_a_wrong_command_line_ends_in_a_sentence(number, template, tmp_path, monkeypatch, capfd, record_property):
    monkeypatch.chdir(template)
    lines = wrong_commands.wrong_lines(0, number + 1, CORE)[number:]
    run("command lines", lines, template, tmp_path, monkeypatch, capfd, record_property)


@pytest.mark.parametrize("name", WHOLE)
def test_a_damaged_file_ends_in_a_sentence(name, template, tmp_path, monkeypatch, capfd, record_property):
    monkeypatch.chdir(template)
    files = wrong_commands.damaged_files(0, 1, [name])
    run("damaged files", files, template, tmp_path, monkeypatch, capfd, record_property)


@pytest.mark.long
def test_every_wrong_command_ends_in_a_sentence(with_runs, tmp_path, monkeypatch, capfd, record_property):
    monkeypatch.chdir(with_runs)
    lines = wrong_commands.wrong_lines(2, 5 * len(COMMANDS), list(COMMANDS))
    run("command lines", lines, with_runs, tmp_path, monkeypatch, capfd, record_property)
    files = wrong_commands.damaged_files(2, 2 * len(wrong_commands.READ), list(wrong_commands.READ))
    run("damaged files", files, with_runs, tmp_path / "files", monkeypatch, capfd, record_property)


READERS = {
    "texts": ("x.jsonl", lambda path: read_texts(DataConfig(data=path))),
    "lines of text": ("x.txt", lambda path: read_texts(DataConfig(data=path, pack=False))),
    **{f"texts in {end}": (f"x.{end}", lambda path: read_texts(DataConfig(data=path))) for end in ("json", "csv", "parquet")},
    "packed texts": ("x.jsonl.gz", lambda path: read_texts(DataConfig(data=path))),
    "questions": ("x.jsonl", read_questions),
    "lines of questions": ("x.txt", read_questions),
    "thoughts": ("x.jsonl", lambda path: list(open_records(path, ThoughtRecord))),
    "thoughts in parquet": ("x.parquet", lambda path: list(open_records(path, ThoughtRecord))),
    "options": ("x.yaml", read_config),
    "options in JSON": ("x.json", read_config),
    "GSM8K": ("x.jsonl", lambda path, tokenizer: GSM8K(path, tokenizer)),
    "CommonsenseQA": ("x.jsonl", lambda path, tokenizer: CommonsenseQA(path, tokenizer)),
}


# A file of options is YAML, whose library takes seconds for those nested deeply; tables are read by datasets, which is slow.
SLOW = ("options", "texts in csv", "texts in parquet")


@pytest.mark.parametrize("reader", [pytest.param(x, marks=pytest.mark.long if x.startswith(SLOW) else ()) for x in READERS])
def test_every_reader_names_a_hostile_file(reader, tmp_path, byte_tokenizer, record_property):
    name, read = READERS[reader]
    contents = {**wrong_commands.HOSTILE_JSON, **wrong_commands.HOSTILE_YAML, **wrong_commands.HOSTILE_BYTES}
    refused, broken = 0, []
    for kind, content in contents.items():
        path = tmp_path / name
        content = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") and len(content) % 2 else content)
        try:
            with limits(patience=PATIENCE):
                read(*(str(path), byte_tokenizer)[: 2 if reader in ("GSM8K", "CommonsenseQA") else 1])
        except (ValueError, UsageError) as error:
            refused += 1
            if str(path) not in str(error) or "\n" in str(error):
                broken.append(f"{kind}: {error}")
        except (Exception, Hang) as error:
            broken.append(f"{kind}: {type(error).__name__}: {str(error)[:100]}")
    counts = {"tried": len(contents), "refused by name": refused, "broke the rule": len(broken)}
    record_property("counts", ["hostile data files", counts])
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["generate", "--model=thinker", "--prompt=x", "--temperature=nan"], 2, "nan is not a number from -1e+30 to 1e+30"),
        (["generate", "--model=thinker", "--prompt=x", "--temperature=1", "--seed=-1"], 2, "from 0 to 4,294,967,295, got -1"),
        (["generate", "--model=thinker", "--prompt=caf\udce9"], 2, "is not UTF-8, or the locale is not"),
        (["think", "x\0", "--model=thinker"], 2, "has a zero byte"),
        (["explain", "x", "--model=thinker", "--out=loop"], 2, "--out must be a file in an existing folder, got loop"),
        (["export", "--model=thinker", "--data=text.txt", "--out=pipe.jsonl"], 2, "--out must be a file in an existing folder"),
        (["export", "--model=thinker", "--data=text.txt", "--out=" + 300 * "x"], 2, "File name too long"),
        (
            ["export", "--model=thinker", "--data=text.txt", "--out=new.jsonl", "--thoughts=0"],
            2,
            "--thoughts must be 1 or more",
        ),
        (["train", "--model=model", "--out=text.txt"], 2, "--out must be a folder that can be written to, got text.txt"),
        (["doctor", "--model=model", "--length=1" + 30 * "0"], 2, "more than 64 bits"),
        (["doctor", "--model=model", f"--length={2**62}"], 2, "rows, and 1,099,511,627,776 are the most"),
        (["doctor", "--" + 100_000 * "x"], 2, "is too long"),
        pytest.param(
            ["star", "--sft-steps=1", "--lora-rank=1" + 9 * "0", "--out=new"], 4, "out of memory", marks=pytest.mark.long
        ),
    ],
)
def test_what_is_said(arguments, code, says, template, tmp_path, monkeypatch, capfd):
    wrong_commands.make_folder(template, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    try:
        with limits(patience=PATIENCE):
            got = main(arguments)
    except SystemExit as end:
        got = end.code
    err = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert got == code and says in err, err
