"""thought_decode on CPUs: the text as in ``thought_attention``, the own rows by small matmuls."""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels.cpu._chunks import by_thought, from_thought, split, step_chunks
from quietstar_kernels.cpu._parts import add_sinks, join, plain, text
from quietstar_kernels.cpu._poison import without_poison
from quietstar_kernels.layout import ThoughtLayout
from quietstar_kernels.reference import wide
