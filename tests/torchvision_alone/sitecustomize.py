"""Lets torchvision be imported beside a torch that it was not built for: its compiled operators are missing then.

torchvision does without them, but for two that it describes to torch unasked; they are declared here. Python runs this
file at its start, where this folder is on PYTHONPATH.
"""

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
