"""``quietstar doctor``: what this machine has, and what training needs."""


def test_doctor(quietstar):
    code, out, _ = quietstar("doctor")
    assert code == 0 and "transformers" in out and "thought_attention" in out
    code, out, _ = quietstar("doctor", "--model=model", "--batch-size=2", "--length=64", "--thoughts=3", "--verify")
    assert code == 0 and "2 x 64 tokens, 5,504 rows" in out and "optimizer moments" in out and "ok" in out.splitlines()[-1]
