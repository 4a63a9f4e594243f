"""rotary_decode, by the kernel of ``rotary``."""

from .rotary import rotary_decode as rotary_decode
