"""``python -m hf_dis.report``: the same as ``hf-dis report``."""

import sys

from hf_dis.commands.main import main

sys.exit(main(["report", *sys.argv[1:]]))
