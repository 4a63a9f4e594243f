"""``python -m quietstar``: the command line."""

import sys

from quietstar.cli import main

sys.exit(main())
