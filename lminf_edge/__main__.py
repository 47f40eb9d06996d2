"""python -m lminf_edge: the command line."""

import sys

from lminf_edge.cli import main

sys.exit(main())
