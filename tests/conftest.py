"""What holds for all tests."""

import os

import torch

# Read when Triton is imported, by whomever. Without a GPU its kernels can only be interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The cores belong to the servers and trainers that tests start; on networks this small a second thread only spins.
torch.set_num_threads(1)
