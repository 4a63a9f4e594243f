"""The parts of examples/digit_sums.py, in the order to read them.

quiet_star.py has what a user of ``quietstar`` writes: wrap a model, train it to think, sample its thoughts, predict with them.

    task.py             lines of digits and asides; what counts as a right answer
    language_model.py   the small Llama and its plain training
    runs.py             which positions think; Quiet-STaR and its controls
    quiet_star.py       Quiet-STaR itself
    pretraining.py      the model that all runs start from, and the gate it must pass
    training.py         training of each run
    evaluation.py       accuracy, loss, mixing weights and thoughts of a trained run
    thresholds.py       the claims of docs/results.md, checked for each seed
    results.py, tables.py, plots.py, report.py, docs_page.py   what was measured: the file, the terminal, the pages

The names below are those that experiments/ uses.
"""

import os

os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # the model is too small for a GPU to help
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads yield a busy core; read when torch is imported

from sums.language_model import new_model, train_lm
from sums.pretraining import RIGHT_STEPS, pretrain
from sums.quiet_star import own_thoughts, predict, predict_lines, think_with
from sums.runs import EQUALS_ONLY, QUIET_STAR
from sums.task import (
    AT_EQUALS,
    DASH,
    DIRECT,
    HELPFUL,
    PAUSE,
    STEPS,
    aside_lines,
    column,
    direct_lines,
    draw,
    right_thoughts,
    running_sums,
    score,
    split_strings,
)
from sums.training import DirectLines, with_rehearsal

__all__ = [
    "AT_EQUALS",
    "DASH",
    "DIRECT",
    "EQUALS_ONLY",
    "HELPFUL",
    "PAUSE",
    "QUIET_STAR",
    "RIGHT_STEPS",
    "STEPS",
    "DirectLines",
    "aside_lines",
    "column",
    "direct_lines",
    "draw",
    "new_model",
    "own_thoughts",
    "predict",
    "predict_lines",
    "pretrain",
    "right_thoughts",
    "running_sums",
    "score",
    "split_strings",
    "think_with",
    "train_lm",
    "with_rehearsal",
]
