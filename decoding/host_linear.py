"""Linear layers that stream their weights once for few rows; the checkpoint's own tensors, no packed copy."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from decoding.attention import Tensor
from decoding.host_build import load_kernels

FEW_ROWS = 64  # the kernel's limit


class FewRowsLinear(nn.Linear):
    """nn.Linear for bf16 on a CPU: up to `few_rows` rows go through `trimtab::linear`, more through torch."""

    few_rows: int

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] -> [..., out_features]."""
        if input.numel() <= self.few_rows * self.in_features and input.dtype == torch.bfloat16:
            out: Tensor = torch.ops.trimtab.linear(input, self.weight, self.bias)
            return out
        return F.linear(input, self.weight, self.bias)


def use_few_rows(model: nn.Module) -> int:
    """Turn the model's plain bf16 CPU linears into FewRowsLinear in place; returns how many."""
    found = [module for module in model.modules() if type(module) is nn.Linear and _suits(module)]
    if not found or not load_kernels():
        return 0
    limit = int(torch.ops.trimtab.few_rows())
    for module in found:
        module.few_rows = limit  # type: ignore[assignment]
        module.__class__ = FewRowsLinear
    return len(found)


def _suits(module: nn.Linear) -> bool:
    weight = module.weight
    plain = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()
    return plain and module.in_features % 32 == 0 and (module.bias is None or module.bias.dtype == weight.dtype)
