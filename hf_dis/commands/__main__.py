"""``python -m hf_dis.commands``: the same as ``hf-dis``, for launchers that start modules."""

import sys

from hf_dis.commands.main import main

sys.exit(main())
