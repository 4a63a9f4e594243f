"""``quietstar think``: the thoughts at some tokens of a text, or at all."""


def test_think(quietstar, trained):
    code, out, _ = quietstar("think", "--model=run", "Hello", "--at", "-1", "0")
    lines = out.splitlines()
    assert code == 0 and [line.split()[:2] for line in lines] == [["0", "'H'"], ["4", "'o'"]] and "|" not in out
    code, out, _ = quietstar("think", "--model=run/checkpoints/step-000004", "Hello", "--seed=3")
    assert code == 0 and len(out.splitlines()) == 5 and all(line.count("  |  ") == 1 for line in out.splitlines())
    assert quietstar("think", "--model=run", "Hello", "--seed=3")[1] == out
