"""The target writes: batched completions of token-id prompts by the engine, in this process."""

from collections.abc import Sequence
from pathlib import Path

from decoding.core import BadRequest, EngineConfig, Policy, Program, Role, Sampling, Term
from decoding.engine import Engine
from decoding.generate import collect, load_models
from decoding.prepare import Entry, prepare
from training.chats import Ids

_PROGRAM = Program("plain", Policy((Term("base", Role("target")),)))


def open_engine(target: Path) -> Engine:
    """An engine with the model in `target`, eager: compiling takes longer than most of what is written here.

    Raises ModelLoadError.
    """
    return Engine(load_models({"target": str(target)}, compile=False), EngineConfig(compile=False))


def write(engine: Engine, prompts: Sequence[Ids], samplings: Sequence[Sampling]) -> list[Ids]:
    """The completion of each prompt under its own sampling, end token included; all of them in one batch.

    Raises ValueError if a prompt does not fit the model.
    """
    catalog = {info.id: Entry(engine.hosted[info.id].text, info) for info in engine.models}
    try:
        requests = [prepare(_PROGRAM, p, sampling, catalog) for p, sampling in zip(prompts, samplings, strict=True)]
    except BadRequest as error:
        raise ValueError(f"a prompt cannot be completed: {error}") from error
    for request in requests:
        engine.submit(request)
    return [tuple(completion.token_ids) for completion in collect(engine.step, requests)]
