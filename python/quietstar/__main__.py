"""``python -m quietstar``: the command line."""

import sys

from quietstar.cli.main import main

sys.exit(main())
