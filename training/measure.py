"""How good a drafter is: acceptance, block efficiency, and the speed-up that memory traffic allows.

Nothing here generates: the responses are the target's own, and every number is an expectation given them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.chats import Ids
from training.heads import is_plain, logits_by_row
from training.losses import acceptance


@dataclass(frozen=True, slots=True)
class Response:
    """What a target wrote after `prompt`, end token included, at one temperature."""

    prompt: Ids
    ids: Ids
    temperature: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of one response: at each of its L tokens, how the drafter stands to the target."""

    accepted: Tensor  # [L] chance that a draft for this place is accepted, 1 - TV
    kept: Tensor  # [L] chance that this very token, the target's, came from the drafter: min(1, q / p)


@torch.no_grad()
def agreements(target: nn.Module, drafter: nn.Module, responses: Sequence[Response], batch: int) -> list[Agreement]:
    """Compare both models along `responses`, each at its own temperature (0: their greedy choices)."""
    found: list[Agreement] = []
    plain = [(model, is_plain(model)) for model in (target, drafter)]
    for first in range(0, len(responses), batch):
        part = responses[first : first + batch]
        ids = padded([response.prompt + response.ids for response in part], next(target.parameters()).device)
        read = [logits_by_row(model, ids, known) for model, known in plain]
        for row, response in enumerate(part):
            where = slice(len(response.prompt) - 1, len(response.prompt) + len(response.ids) - 1)
            wanted, drafted = (logits(row, where).float() for logits in read)  # [L, vocab]
            width = min(wanted.shape[-1], drafted.shape[-1])
            found.append(_agreement(response, wanted[:, :width], drafted[:, :width]))
    return found


def padded(sequences: Sequence[Ids], device: torch.device) -> Tensor:
    """Ids [sequences, longest]; padding (id 0) goes to the right, where a causal model does not look."""
    longest = max(len(sequence) for sequence in sequences)
    return torch.tensor([list(sequence) + [0] * (longest - len(sequence)) for sequence in sequences], device=device)


def _agreement(response: Response, target: Tensor, draft: Tensor) -> Agreement:
    """`target` and `draft` [L, vocab] fp32: the logits that predict the response's tokens."""
    tokens = torch.tensor(response.ids, device=target.device)
    if response.temperature == 0:
        best = draft.argmax(-1)
        return Agreement((best == target.argmax(-1)).float().cpu(), (best == tokens).float().cpu())
    target, draft = target / response.temperature, draft / response.temperature
    at = tokens[:, None]
    ratio = draft.log_softmax(-1).gather(1, at) - target.log_softmax(-1).gather(1, at)  # [L, 1]
    return Agreement(acceptance(target, draft).cpu(), ratio[:, 0].exp().clamp(max=1).cpu())


def passes(kept: Sequence[float], gamma: int) -> float:
    """Expected target passes that write one text by drafts of length `gamma`, exactly, given the text.

    `kept`: per token the chance min(1, q / p) that it, being the output, was an accepted draft. A pass that keeps
    k < gamma drafts writes k + 1 tokens, the last one corrected; one that keeps all writes gamma + 1 (Leviathan et al.
    2023, arXiv:2211.17192, algorithm 1).
    """
    length = len(kept)
    expected = [0.0] * (length + gamma + 2)  # from token t on; nothing is left behind the end
    for start in reversed(range(length)):
        chance, total = 1.0, 1.0
        for k in range(gamma):
            keep = kept[start + k] if start + k < length else 0.0
            total += chance * (1 - keep) * expected[start + k + 1]
            chance *= keep
        expected[start] = total + chance * expected[start + gamma + 1]
    return expected[0]


def block_efficiency(found: Sequence[Agreement], gamma: int) -> float:
    """Tokens a target pass, tau, over whole responses."""
    tokens = sum(len(each.kept) for each in found)
    return tokens / max(1e-9, sum(passes(each.kept.tolist(), gamma) for each in found))


def estimated_efficiency(alpha: float, gamma: int) -> float:
    """tau were every draft accepted with the same chance: sum of alpha^i, i = 0..gamma (arXiv:2211.17192, eq. 1)."""
    return float(sum(alpha**i for i in range(gamma + 1)))


def mbsu(tau: float, gamma: int, size_ratio: float) -> float:
    """Memory-bound speed-up tau / (1 + gamma c), c the drafter's parameters over the target's (arXiv:2403.00858)."""
    return tau / (1 + gamma * size_ratio)


def report(
    found: Sequence[Agreement], responses: Sequence[Response], gammas: Sequence[int], size_ratio: float
) -> dict[str, Any]:
    """By temperature: mean acceptance over tokens, and for each draft length tau, its estimate, and MBSU."""
    table: dict[str, Any] = {}
    for temperature in sorted({response.temperature for response in responses}):
        mine = [each for each, r in zip(found, responses, strict=True) if r.temperature == temperature]
        alpha = float(torch.cat([each.accepted for each in mine]).mean())
        lengths: dict[str, dict[str, float]] = {}
        for gamma in gammas:
            tau = block_efficiency(mine, gamma)
            numbers = {"tau": tau, "estimate": estimated_efficiency(alpha, gamma), "mbsu": mbsu(tau, gamma, size_ratio)}
            lengths[str(gamma)] = {name: round(value, 3) for name, value in numbers.items()}
        table[f"{temperature:g}"] = {"acceptance": round(alpha, 4), "draft_length": lengths}
    return table
