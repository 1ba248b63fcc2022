"""`python -m server`: the command line. Light to import, because the engine's process imports it again."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

import typer

Text = Annotated[str | None, typer.Option()]
Count = Annotated[int | None, typer.Option()]
Flag = Annotated[bool | None, typer.Option()]
Many = Annotated[list[str] | None, typer.Option(help="May be given several times.")]


def command(
    model: Annotated[str | None, typer.Argument(help="A Hugging Face directory or hub id to serve alone.")] = None,
    config: Annotated[str | None, typer.Option(help="A YAML file; its keys are named like these flags.")] = None,
    host: Text = None,
    port: Count = None,
    served_model_name: Many = None,
    api_key: Many = None,
    admin_key: Annotated[
        str | None, typer.Option(help="Opens /admin/adapters, which is closed without it; another key than --api-key.")
    ] = None,
    admin_root: Annotated[
        str | None, typer.Option(help="The folder that adapters may be loaded from over HTTP; needs --admin-key.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    max_model_len: Count = None,
    max_num_seqs: Count = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens of all models in one tick.")] = None,
    max_logit_rows: Count = None,
    max_search_tokens: Annotated[
        int | None, typer.Option(help="Tokens a tick of searches and their scorers while others stream.")
    ] = None,
    max_queue: Annotated[int | None, typer.Option(help="Sequences that may wait.")] = None,
    kv_memory: Annotated[str | None, typer.Option(help="Bytes for keys and values, such as 8GiB.")] = None,
    block_size: Count = None,
    enable_prefix_caching: Flag = None,
    enforce_eager: Annotated[bool | None, typer.Option(help="Do not compile forwards.")] = None,
    batch_invariant: Annotated[
        bool | None, typer.Option(help="The same logits whatever else is in the batch, to the bit; slower.")
    ] = None,
    compile_from: Annotated[
        int | None, typer.Option(help="Parameters from which a model is compiled; smaller ones start at once.")
    ] = None,
    self_check: Annotated[
        bool | None, typer.Option(help="Compare each model with its own forward at the start.")
    ] = None,
    threads: Count = None,
    trust_remote_code: Flag = None,
    negative_weights: Annotated[str | None, typer.Option(help="definition or any.")] = None,
    chat_template_kwargs: Annotated[list[str] | None, typer.Option(help="Names that clients may set.")] = None,
    shutdown_timeout: Annotated[
        float | None, typer.Option(help="Seconds that running requests get at SIGTERM.")
    ] = None,
    log_level: Text = None,
    max_body_size: Text = None,
    max_n: Count = None,
    max_candidates: Annotated[int | None, typer.Option(help="Hypotheses that a search may have side by side.")] = None,
    max_scored_texts: Annotated[int | None, typer.Option(help="Texts of one request to /v1/score.")] = None,
    max_logprobs: Count = None,
    max_prompt_logprobs: Count = None,
    max_logit_bias: Count = None,
    max_stop: Count = None,
    max_stop_length: Count = None,
) -> None:
    """Serves models by OpenAI's API; without a model, the embedded family.

    Every flag may also be set as TRIMTAB_<FLAG> in the environment or in the YAML file; a flag wins over both.
    """
    flags = {key: value for key, value in locals().items() if key not in ("model", "config")}
    raise typer.Exit(run(model, config, flags))


def run(model: str | None, file: str | None, flags: dict[str, Any]) -> int:
    """Serves; returns the exit code: 0 after a drain, 1 for what cannot start, 2 for a bad configuration."""
    from uvicorn.loops.auto import auto_loop_factory

    from decoding.core import TrimtabError
    from server.config import ConfigError, load_config
    from server.start import serve

    try:
        config = load_config(flags, model=model, file=file)
        with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
            runner.run(serve(config))
    except ConfigError as error:
        return _complain(str(error), 2)
    except TrimtabError as error:
        return _complain(str(error), 1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    return 0


def _complain(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def main() -> None:
    """The console script."""
    typer.run(command)


if __name__ == "__main__":
    main()
