"""The CUDA kernels on the CPU: a grid of cases with sanitizers, and bugs that must be found."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import emulated  # noqa: E402
from emulated import Bug  # noqa: E402

pytestmark = [pytest.mark.build, pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))]


def run_grid(kind, *parts, bug=None):
    """The finished process; stderr names the bug if it found one."""
    command = [sys.executable, HERE / "grid.py", emulated.build(kind, bug), *parts]
    return subprocess.run(command, env=emulated.environment(kind), capture_output=True, text=True)


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_grid(kind):
    """The plain build serves tests/kernels."""
    done = run_grid(kind)
    assert done.returncode == 0, done.stderr


def decode(*changes):
    """A bug of thought_decode: (file, old, new), for heads of 64."""
    return Bug(("thought_decode_64.cu",), tuple((f"thought_decode_{file}.cuh", old, new) for file, old, new in changes))


def sample(old, new):
    return Bug(("sample_token.cu",), (("sample_token.cu", old, new),))


WRONG, RACE = "AssertionError", "WARNING: ThreadSanitizer: data race"
OVERRUN = "ERROR: AddressSanitizer: heap-buffer-overflow"
DEADLOCK = "deadlock: a barrier that not all threads reach"
DIVERGENT = "lanes of one warp meet in different operations"
WAIT = "cp_async_wait<Tile::STAGES - 2>();"
NO_BARRIER = decode(("kernel", f"{WAIT} block_sync();", WAIT))
DEAD = "&& notes.text[16 * warp + row_of].count > 0"  # zeros for thoughts that are off
BUGS = {  # the build and the part of the grid that find it, and the message; one for each way of being found
    "a barrier is missing": ("thread", "decode", RACE, NO_BARRIER),
    "a wait is one group too lax": ("plain", "decode", WRONG, decode(("kernel", WAIT, WAIT.replace("2", "1")))),
    "row L of the text is read": ("address", "decode", OVERRUN, decode(("tile", "row + i <= end;", "row + i <= end + 1;"))),
    "shared memory is 16 bytes short": (
        "address",
        "decode",
        OVERRUN,
        decode(("tile", "sizeof(Notes);", "sizeof(Notes) - 16;")),
    ),
    "four numbers are loaded from an odd address": (
        "address",
        "sample",
        "misaligned address",
        sample("const float4*>(row + first + i)", "const float4*>(row + first + i + 1)"),
    ),
    "a lane skips an mma": (
        "plain",
        "decode",
        DIVERGENT,
        decode(("softmax", "mma<T>(right, a, b_right);", "if (threadIdx.x % WARP != 7) mma<T>(right, a, b_right);")),
    ),
    "a thread leaves early": ("plain", "sample", DEADLOCK, sample("block_sync();", "if (lane != 5) block_sync();")),
    "a dead thought's cache is multiplied": (
        "plain",
        "decode",
        WRONG,
        decode(("tile", DEAD, "&& row_of >= 0"), ("kernel", "again || finite[0]", "true")),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_found(name):
    kind, part, says, bug = BUGS[name]
    done = run_grid(kind, part, bug=bug)
    assert done.returncode != 0 and says in done.stderr, done.stderr
    if bug is NO_BARRIER:
        assert "cp_async_wait" in done.stderr and "ldmatrix4" in done.stderr  # who writes, and who reads
