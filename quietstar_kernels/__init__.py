"""Attention, decoding, sampling and log-probabilities for thoughts at every position of a text (Quiet-STaR).

Dimension key, for code, docstrings and errors:

=  ==========================================  =  ==========================================
B  batch                                       M  packed rows, L + R
L  text positions                              H  query heads
P  anchors: text positions that think          G  key/value heads, H a multiple of G
N  thoughts per anchor                         K  head width of queries and keys
T  sampled tokens of a thought                 E  head width of values
J  look-ahead: tokens predicted by a thought   D  model width
S  rows per thought, T + J + 1                 V  vocabulary
R  thought rows, P*N*S, r = (p*N + n)*S + s    W  window, in position ids
C  branches; a grid has P*N
=  ==========================================  =  ==========================================
"""

from . import _first_use, self_test
from ._dispatch import backends
from .cpu._library import cpu_library
from .cuda._library import cuda_library
from .gated_activation import gated_activation
from .layout import ThoughtLayout
from .linear_divergence import linear_divergence
from .linear_logprob import linear_logprob
from .parallel import gather_text, text_attention, vocab_parallel_logprob
from .rms_norm import rms_norm
from .rotary import rotary
from .rotary_decode import rotary_decode
from .sample_thoughts import sample_thoughts
from .sample_token import sample_token
from .thought_attention import thought_attention
from .thought_conv import conv_tails, thought_conv, thought_conv_decode
from .thought_decode import thought_decode
from .thought_delta import DeltaRows, thought_delta
from .thought_delta_decode import advance_states, anchor_states, text_states, thought_delta_decode

_first_use.CASES.update(self_test.FIRST_USE)

__version__ = "0.1.0"

__all__ = [
    "DeltaRows",
    "ThoughtLayout",
    "advance_states",
    "anchor_states",
    "backends",
    "conv_tails",
    "cpu_library",
    "cuda_library",
    "gated_activation",
    "gather_text",
    "linear_divergence",
    "linear_logprob",
    "rms_norm",
    "rotary",
    "rotary_decode",
    "sample_thoughts",
    "sample_token",
    "text_attention",
    "text_states",
    "thought_attention",
    "thought_conv",
    "thought_conv_decode",
    "thought_decode",
    "thought_delta",
    "thought_delta_decode",
    "vocab_parallel_logprob",
]
