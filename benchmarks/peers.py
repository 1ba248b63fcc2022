"""The peers in the same run: transformers' `generate`, and a per-request loop of three transformers forwards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one measured call: `step` is a decode step of the whole batch, `total` all of it."""

    step: float
    total: float


class _Stamps(StoppingCriteria):  # type: ignore[misc]
    """Never stops; notes the time of every new token. On a device, only the first and the last have been waited for."""

    def __init__(self, count: int) -> None:
        self.times: list[float] = []
        self._count = count

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if len(self.times) in (0, self._count - 1):
            wait_for(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def wait_for(device: torch.device) -> None:
    """Until everything that was launched there is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load_peer(path: Path) -> Any:
    """The model as transformers loads it by default (SDPA attention), in the checkpoint's dtype."""
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


@torch.inference_mode()
def hf_generate(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any) -> Timing:
    """Greedy `generate` of a batch of equally long prompts, `new_tokens` each; `options` are its own."""
    stamps = _Stamps(new_tokens)
    began = time.perf_counter()
    ids = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([stamps]),
        **options,
    )
    total = time.perf_counter() - began
    return Timing((stamps.times[-1] - stamps.times[0]) / (new_tokens - 1), total)


@torch.inference_mode()
def hf_proxy_loop(models: Sequence[Any], weights: Sequence[float], prompt: Sequence[int], new_tokens: int) -> Timing:
    """Proxy-tuning as the research scripts do it: one request, three cached forwards a token, the mix, argmax."""
    began = time.perf_counter()
    ids = torch.tensor([list(prompt)])
    caches: list[Any] = [None] * len(models)
    times: list[float] = []
    for _ in range(new_tokens):
        z: Any = 0.0
        for i, (model, weight) in enumerate(zip(models, weights, strict=True)):
            out = model(input_ids=ids, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
            caches[i] = out.past_key_values
            z = z + weight * out.logits[:, -1].float()
        ids = z.argmax(dim=-1, keepdim=True)
        times.append(time.perf_counter())
    return Timing((times[-1] - times[0]) / (new_tokens - 1), times[-1] - began)
