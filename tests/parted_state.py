"""What a checkpoint in parts holds, before it is parted."""

import torch

# Some have fewer rows than there are processes, none divides evenly by 2 and by 3.
MOMENTS = {
    "wide": torch.arange(35, dtype=torch.float32).reshape(7, 5),
    "row": torch.tensor([[1.5, -2.5, 0.25]]),
    "vector": torch.tensor([3.0, 4.0]),
    "half": (torch.arange(20) / 7).bfloat16().reshape(5, 2, 2),
    "codes": torch.arange(11, dtype=torch.uint8),
}
WEIGHT = torch.arange(10, dtype=torch.float32).reshape(5, 2)
CURSOR = torch.tensor([7, 9])
