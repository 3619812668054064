"""What holds for all tests."""

import torch

# The cores belong to the servers and trainers that tests start; on networks this small a second thread only spins.
torch.set_num_threads(1)
