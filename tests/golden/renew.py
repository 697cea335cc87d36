"""Renew golden files on purpose, all or those named: python tests/golden/renew.py [NAME...]"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parents[2])
)  # measure this checkout's sslrun, even if another is installed

from test_golden import renew

if __name__ == "__main__":
    renew(sys.argv[1:])
