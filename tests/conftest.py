"""What all tests share."""

import hypothesis
import torch

# The same examples on every machine, however slow it is today.
hypothesis.settings.register_profile("everywhere", deadline=None, derandomize=True)
hypothesis.settings.load_profile("everywhere")
torch.set_num_threads(1)
