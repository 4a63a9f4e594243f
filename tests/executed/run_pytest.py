import sys
from ttsem.sanitize import run_pytest
sys.exit(run_pytest(sys.argv[2:], int(sys.argv[1])))
