"""The command line. Each command is a file of this folder; ``COMMANDS`` lists them.

Exit codes: 0 done, 2 usage, 3 data, model or checkpoint, 4 a failure at run time, 75 stopped by a signal and saved,
130 stopped with nothing to save. Errors are one line on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from transformers.utils import logging

from quietstar.cli.ask import Ask
from quietstar.cli.doctor import Doctor
from quietstar.cli.errors import DATA, RUNTIME, SAVED, STOPPED, USAGE, Failure, UsageError, first_line
from quietstar.cli.eval import Eval
from quietstar.cli.explain import Explain
from quietstar.cli.export import Export
from quietstar.cli.fast import Fast
from quietstar.cli.generate import Generate
from quietstar.cli.internalize import Internalize
from quietstar.cli.options import parse
from quietstar.cli.score import Score
from quietstar.cli.solve import Solve
from quietstar.cli.star import Star
from quietstar.cli.think import Think
from quietstar.cli.train import Train
from quietstar.cli.vstar import VStar
from quietstar.recipes.common.log import on_terminal
from quietstar.run.signals import Interrupted

COMMANDS = {
    "train": Train,
    "think": Think,
    "generate": Generate,
    "explain": Explain,
    "eval": Eval,
    "ask": Ask,
    "export": Export,
    "doctor": Doctor,
    "star": Star,
    "vstar": VStar,
    "solve": Solve,
    "internalize": Internalize,
    "score": Score,
    "fast": Fast,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``SystemExit`` after --help and on options that can't be read."""
    logging.disable_progress_bar()
    try:
        with on_terminal():
            parse(COMMANDS, list(sys.argv[1:] if arguments is None else arguments)).run()
        return 0
    except UsageError as error:
        code, text = USAGE, str(error)
    except Failure as error:
        code, text = error.code, str(error)
    except ValueError as error:
        code, text = DATA, first_line(error)
    except Interrupted as stop:
        code, text = SAVED, f"{stop}; continue with --resume"
    except (OSError, FloatingPointError) as error:
        code, text = RUNTIME, first_line(error)
    except KeyboardInterrupt:
        code, text = STOPPED, "stopped; nothing was saved since the last checkpoint or round"
    print(f"quietstar: {text}", file=sys.stderr)
    return code
