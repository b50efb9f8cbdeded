"""python -m kvcomp: the command line."""

import sys

from kvcomp.cli import main

sys.exit(main())
