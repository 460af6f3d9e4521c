"""A thread for each process of tests: there is one for each core, and threads that wait for each other keep it busy."""

import os

# Before PyTorch reads them; what tests start inherits them
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
