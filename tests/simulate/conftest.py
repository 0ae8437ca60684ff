"""The simulators' products are small: BLAS threads only get in each other's way."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
