"""A judge head: which of the drafts that the exact rule would refuse do no harm.

One weight row w and a bias b on the target's last hidden state h, the input of its output embeddings, AT the draft
token's own position: w . h + b > logit(threshold) accepts the draft (Bachmann et al. 2025, arXiv:2501.19309). A head
belongs to the weights that it was trained on, so it carries their hash.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from decoding.core import ModelLoadError

WEIGHTS, CARD = "judge.safetensors", "trimtab.json"


@dataclass(frozen=True, slots=True)
class JudgeHead:
    """`weight` [hidden] fp32, `bias`, and the `weights_hash` of the target that they were trained on.

    weight . h + bias is the logit of "this draft may stay" at hidden state h.
    """

    weight: Tensor
    bias: float
    target_hash: str = ""

    def score(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n] fp32 logits."""
        return hidden.float() @ self.weight.to(hidden.device) + self.bias


def read_judge(path: str | Path) -> JudgeHead:
    """The judge head in a directory with judge.safetensors (`weight` [hidden], `bias` [1]) and trimtab.json.

    Raises ModelLoadError, with a sentence that says what is wrong: a file is missing or cannot be read, a shape is
    another one, a number is not finite, the card names no target.
    """
    directory = Path(path)
    for name in (WEIGHTS, CARD):
        if not (directory / name).is_file():
            raise ModelLoadError(f"{directory} has no {name}, so it is not a judge head; make one with training judge.")
    weight, bias = _tensors(directory / WEIGHTS)
    target, size = _card(directory / CARD)
    if size is not None and size != weight.shape[0]:
        raise ModelLoadError(
            f"{directory / CARD} says hidden_size {size}, but the weight in {WEIGHTS} has {weight.shape[0]} numbers."
        )
    return JudgeHead(weight, bias, target)


def local_directory(path: str) -> Path:
    """Where the files of a model's `path` lie, a directory or the id of a hub model that has been loaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, local_files_only=True))


def weights_hash(directory: str | Path) -> str:
    """sha256 over the bytes of a directory's safetensors files in the order of their names, in hex.

    Raises ModelLoadError if there are none.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"{directory} has no safetensors files to hash.")
    running = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                running.update(piece)
    return running.hexdigest()


def _tensors(file: Path) -> tuple[Tensor, float]:
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{file} cannot be read as safetensors: {error}.") from error
    missing = sorted({"weight", "bias"} - set(stored))
    if missing:
        raise ModelLoadError(f"{file} lacks the tensor {' and '.join(missing)}.")
    weight, bias = stored["weight"], stored["bias"]
    if weight.ndim != 1 or weight.numel() == 0 or tuple(bias.shape) != (1,):
        raise ModelLoadError(
            f"{file} holds weight {list(weight.shape)} and bias {list(bias.shape)}; "
            "a judge head is weight [hidden] and bias [1]."
        )
    if not (weight.is_floating_point() and bias.is_floating_point()):
        raise ModelLoadError(f"{file} holds {weight.dtype} and {bias.dtype}; a judge head is floating point.")
    weight, bias = weight.float(), bias.float()
    if not (bool(weight.isfinite().all()) and bool(bias.isfinite().all())):
        raise ModelLoadError(f"{file} holds numbers that are not finite; train the judge head again.")
    return weight, float(bias)


def _card(file: Path) -> tuple[str, int | None]:
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(card, dict) or card.get("role") != "judge" or not isinstance(card.get("target_hash"), str):
        raise ModelLoadError(f'{file} needs "role": "judge" and "target_hash", the hash of the target\'s weights.')
    size = card.get("hidden_size")
    return card["target_hash"], size if isinstance(size, int) else None
