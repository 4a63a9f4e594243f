"""On-policy distillation (arXiv 2306.13649): a student's divergence from a teacher over sequences that begin alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quietstar.group_rl.completions import through, through_head
from quietstar.group_rl.shared_logprobs import check_sequences, model_and_head, parts_of, trees_of
from quietstar_kernels import linear_divergence
from quietstar_kernels.checks import Checker


def shared_divergence(
    student: nn.Module,
    teacher: nn.Module,
    sequences: Sequence[Sequence[int] | Tensor],
    beta: float = 1.0,
    temperature: float = 1.0,
) -> list[Tensor]:
    """The divergence of the student's distribution of each token but the first from the teacher's, in nats, given those before.

    A prompt, a turn or an attempt that several sequences begin with is computed once by each model, and so is its divergence.
    It is over the whole vocabulary, without logits: see ``quietstar_kernels.linear_divergence``. Differentiable in the student;
    the teacher is a constant, in the mode that it is in: call ``teacher.eval()``. What ``shared_logprobs`` says of several
    processes holds here too.

    Args:
        student: as the model of ``shared_logprobs``; it may be wrapped.
        teacher: likewise. Another size, dtype or architecture, but the same vocabulary and device.
        sequences: token ids of each, as lists or integer tensors [T].
        beta: 0 is KL(teacher ‖ student), 1 is KL(student ‖ teacher), between them is the generalized Jensen-Shannon divergence.
        temperature: divides the logits of both.

    Returns:
        For each sequence, fp32 [T-1] (fp64 for fp64 students), on the student's device.

    Raises:
        ValueError: as for ``shared_logprobs``, two vocabularies of different sizes, or another ``beta``.
    """
    check = Checker("shared_divergence")
    own, own_head = model_and_head("shared_divergence: student", student)
    other, other_head = model_and_head("shared_divergence: teacher", teacher)
    given, temperature, beta = check.sequences(sequences), check.temperature(temperature), check.fraction("beta", beta)
    check_sequences(check, own, given)
    heads = [own_head.of(own), other_head.of(other)]
    sizes = [head.linear.out_features for head in heads]
    if sizes[0] != sizes[1]:
        raise check.fail(f"the teacher must have the student's vocabulary of {sizes[0]}, got {sizes[1]}: resize its embeddings")
    (tokens,), in_order = trees_of(given, None, parts_of(given))

    # The student's forward is inside that of the teacher's head, and the loss inside both heads: there the weights of both are
    # gathered, if they are sharded, and again before the backward reads them.
    def by_teacher() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            hidden = tokens.hidden(other)
        return through_head(other, by_teacher_head, hidden)

    def by_teacher_head(hidden: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight, bias = heads[1].operands(hidden)
        options = {"teacher_bias": bias, "teacher_scale": heads[1].scale, "teacher_softcap": heads[1].softcap}
        options |= {"teacher_hidden": rows, "teacher_weight": weight, "beta": beta, "temperature": temperature}

        def by_student_head(hidden: Tensor) -> tuple[Tensor, Tensor]:
            found = heads[0].apply(linear_divergence, hidden, **options)
            return found, torch.zeros_like(found)

        return through(student, own, lambda: through_head(own, by_student_head, tokens.hidden(own)))

    return in_order(tokens.spread(through(teacher, other, by_teacher)[0]))
