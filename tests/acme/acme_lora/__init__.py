"""Acme's LoRA: a linear layer with a branch, which can be merged."""

import torch
from torch import nn


class LoraLinear(nn.Module):
    """y = x Wᵀ + b + scaling · (x Aᵀ) Bᵀ; merged, W holds the branch."""

    def __init__(self, linear: nn.Linear, r: int, scaling: float) -> None:
        super().__init__()
        self.linear = linear
        self.scaling = scaling
        self.merged = False
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.merged:
            return y
        return y + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling

    @torch.no_grad()
    def merge(self) -> None:
        if not self.merged:
            self.linear.weight += self.scaling * (self.lora_B @ self.lora_A)
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged:
            self.linear.weight -= self.scaling * (self.lora_B @ self.lora_A)
            self.merged = False
