"""What an engine serves: models on one device and their KV memory, adapters, judge heads, scorers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from decoding.admit import Hosted
from decoding.core import EngineConfig, ModelLoadError, ModelSpec, UnknownModel
from decoding.events import ModelInfo
from decoding.hosting import ModelRunner
from decoding.judge import JudgeHead
from decoding.kv import BlockPool
from decoding.memory import divide_kv
from decoding.prepare import Entry
from decoding.scorers.build import ScorerModel, check_model, make_scorer
from decoding.scorers.spec import Remote, Scorer, ScorerSpec
from decoding.streams import use_device
from decoding.text import TextModel


class Served:
    """Takes over the runners, and divides the KV memory between them.

    `hosted`: by id, adapters too; `runners` and `pools`: by model. Raises ModelLoadError if the memory is too little,
    the models are not in one place, or one cannot score as it is said to.
    """

    def __init__(
        self,
        models: Mapping[str, Hosted],
        config: EngineConfig,
        judges: Mapping[str, JudgeHead] | None = None,
        remotes: Mapping[str, Remote] | None = None,
    ) -> None:
        self.hosted = dict(models)
        for id, held in self.hosted.items():
            check_model(scorer_model(id, held))
        self.runners = {id: held.runner for id, held in models.items() if held.adapter is None}
        self.device = _common_device(self.runners)
        use_device(self.device)
        self.pools: dict[str, BlockPool] = {}
        for id, blocks in divide_kv(self.runners, {i: models[i].kv_memory for i in self.runners}, config).items():
            self.runners[id].be_batch_invariant(config.batch_invariant)
            self.runners[id].allocate(blocks, config.block_size)
            self.runners[id].warm_up(config.compile_from)
            self.pools[id] = BlockPool(blocks, config.block_size)
        self.judges = {id: replace(head, weight=head.weight.to(self.device)) for id, head in (judges or {}).items()}
        self.remotes = dict(remotes or {})
        self.models = self._infos()

    def catalog(self) -> dict[str, Entry]:
        """What is served now, as `prepare` wants it."""
        return {info.id: Entry(self.hosted[info.id].text, info) for info in self.models}

    def make_scorer(self, spec: ScorerSpec, model: str) -> Scorer:
        """The scorer that a request to `model` asks for. Raises BadRequest and EngineFailure."""
        return make_scorer(spec, {id: scorer_model(id, held) for id, held in self.hosted.items()}, self.remotes, model)

    def check_adapter(self, spec: ModelSpec) -> Hosted:
        """The model that the adapter is of. Raises ModelLoadError if it is not served, or the id is another's."""
        taken = self.hosted.get(spec.id)
        base = self.hosted.get(spec.of or "")
        if base is None or base.adapter is not None:
            raise ModelLoadError(f"The adapter '{spec.id}' is of '{spec.of}', which is no model that is served.")
        if taken is not None and (taken.adapter is None or taken.adapter.of != spec.of):
            raise ModelLoadError(f"The id '{spec.id}' is taken.")
        return base

    def load_adapter(self, spec: ModelSpec, text: TextModel | None = None) -> None:
        """In place of an earlier one with its id. Raises ModelLoadError; then nothing has changed."""
        base = self.check_adapter(spec)
        info = base.runner.load_adapter(spec.id, spec.path)
        self.hosted[spec.id] = Hosted(base.runner, text or base.text, adapter=info)
        self.models = self._infos()

    def known_adapter(self, id: str) -> Hosted:
        """The adapter with this id. Raises UnknownModel."""
        held = self.hosted.get(id)
        if held is None or held.adapter is None:
            raise UnknownModel(id, [each for each, model in self.hosted.items() if model.adapter is not None])
        return held

    def unload_adapter(self, id: str) -> None:
        """Raises UnknownModel."""
        self.known_adapter(id).runner.unload_adapter(id)
        del self.hosted[id]
        self.models = self._infos()

    def _infos(self) -> tuple[ModelInfo, ...]:
        return tuple(self._info(id) for id in self.hosted)

    def _info(self, id: str) -> ModelInfo:
        adapter = self.hosted[id].adapter
        model = id if adapter is None else adapter.of
        runner, pool = self.runners[model], self.pools[model]
        capacity = pool.num_blocks * pool.block_size
        return ModelInfo(
            id,
            min(runner.max_model_len, capacity),
            runner.width,
            capacity,
            runner.parameters if adapter is None else adapter.parameters,
            str(runner.dtype).removeprefix("torch."),
            str(runner.device),
            None if adapter is None else adapter.of,
            self.hosted[id].kind,
        )


def _common_device(runners: Mapping[str, ModelRunner]) -> torch.device:
    """Where all models are. Raises ModelLoadError if they are not in one place, where their rows can be mixed."""
    devices = {id: runner.device for id, runner in runners.items()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"'{id}' on {device}" for id, device in devices.items())
        raise ModelLoadError(f"All models must be on one device, but the engine has {where}.")
    return next(iter(devices.values()))


def scorer_model(id: str, held: Hosted) -> ScorerModel:
    """A hosted model as scorers see it."""
    spec = held.spec or ModelSpec(id, "")
    kind = "adapter" if held.adapter is not None and held.kind == "causal" else held.kind
    head = getattr(held.runner, "head", None)
    tokens = tuple(spec.score_tokens or ())
    return ScorerModel(id, held.text, kind, held.runner.width, head, spec.step_marker, tokens, spec.rendering)
