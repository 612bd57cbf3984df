"""``python -m rlhf_ray``: the same as the command ``rlhf-ray``."""

import sys

from rlhf_ray.cli.main import main

sys.exit(main())
