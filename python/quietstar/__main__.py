"""``python -m quietstar``: the command line."""

import sys

from quietstar.cli.entry import main

sys.exit(main())
