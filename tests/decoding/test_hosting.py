"""Packed, paged forwards of every served architecture equal Hugging Face's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from decoding.core import ModelLoadError
from decoding.hosting import SpanInput
from decoding.runner import Runner
from tests.tiny import LONGROPE, SERVED, VOCAB, tiny_model

BLOCK = 4
NEW = 12
PROMPTS = (3, 17, 26)  # lengths: shorter than a block, longer than window and chunk
CHUNKS = (2, 5, 11)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts() -> list[list[int]]:
    noise = torch.Generator().manual_seed(7)
    return [torch.randint(1, VOCAB, (n,), generator=noise).tolist() for n in PROMPTS]


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """HF's own greedy continuation of `NEW` ids, and its logits [length, width] over the whole text."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    text = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return text[0].tolist(), model(input_ids=text, use_cache=False).logits[0]


def decode_packed(runner: Runner, texts: list[list[int]], new: int = NEW) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy texts and their rows' logits; all tracks in one forward a tick, each with its own chunk size.

    Short prompts decode while long ones are still being prefilled. Blocks are scattered over the pool.
    """
    per_track = -(-(max(map(len, texts)) + new) // BLOCK)
    total = per_track * len(texts)
    runner.allocate(total, BLOCK)
    order = [(7 * i + 3) % total for i in range(total)] if total % 7 else list(range(total))[::-1]
    tables = [order[i * per_track : (i + 1) * per_track] for i in range(len(texts))]
    texts = [list(text) for text in texts]
    ends = [len(text) + new for text in texts]
    done = [0] * len(texts)
    rows: list[list[torch.Tensor]] = [[] for _ in texts]
    while any(len(text) < end for text, end in zip(texts, ends)):
        spans, owners = [], []
        for i, text in enumerate(texts):
            if len(text) == ends[i]:
                continue
            part = text[done[i] : done[i] + CHUNKS[i % len(CHUNKS)]]
            spans.append(SpanInput(part, done[i], tables[i], range(len(part))))
            owners.append(i)
        logits = runner.forward(spans).logits.split([len(span.token_ids) for span in spans])
        for i, span, row in zip(owners, spans, logits):
            rows[i].append(row)
            done[i] += len(span.token_ids)
            if done[i] == len(texts[i]):
                texts[i].append(int(row[-1].argmax()))
    return texts, [torch.cat(row) for row in rows]


def check_exact(model: PreTrainedModel, *, kernels: bool = True, tolerance: float = 1e-4) -> None:
    expected = [generate(model, prompt) for prompt in prompts()]
    runner = Runner(model, "tiny", kernels=kernels)
    try:
        texts, rows = decode_packed(runner, prompts())
    finally:
        runner.close()
    for (text, logits), got, row in zip(expected, texts, rows):
        scale = max(1.0, float(logits.abs().max()))
        torch.testing.assert_close(row, logits[: len(row)], rtol=0, atol=tolerance * scale)
        assert got == text


@pytest.mark.parametrize("arch", sorted(SERVED))
def test_greedy_text_and_logits_equal_transformers(arch: str) -> None:
    check_exact(tiny_model(arch))


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_torch_path_equals_transformers_too(arch: str) -> None:
    check_exact(tiny_model(arch), kernels=False)


def test_longrope_is_exact_below_its_original_length() -> None:
    check_exact(tiny_model("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64))


def test_a_wrong_window_fails_this_comparison() -> None:
    """The comparison above must be able to fail: ignore the window, and the texts differ."""
    model = tiny_model("mistral")
    expected = generate(model, prompts()[2])[1]
    runner = Runner(model, "tiny")
    for layer in runner.layers:
        assert layer.spec.window == 8
        layer.spec = type(layer.spec)(*(getattr(layer.spec, f) if f != "window" else 0 for f in layer.spec.__slots__))
    rows = decode_packed(runner, prompts())[1][2]
    runner.close()
    assert float((rows - expected[: len(rows)]).abs().max()) > 0.05


def test_hidden_rows_are_what_the_head_was_given() -> None:
    model = tiny_model("gemma2")  # its logits are capped after the head, so hidden is not recoverable from them
    ids = prompts()[1]
    with torch.inference_mode():
        expected = model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    runner = Runner(model, "tiny")
    runner.allocate(8, BLOCK)
    spans = [SpanInput(ids, 0, range(5), [0, 4, 16]), SpanInput(ids[:3], 0, [6], [])]
    rows = runner.forward(spans, want_hidden=True)
    assert rows.hidden is not None
    assert rows.hidden.shape == (3, runner.hidden_size)
    assert rows.logits.shape == (3, runner.width)
    torch.testing.assert_close(rows.hidden, expected[[0, 4, 16]], rtol=1e-4, atol=1e-4)
    assert runner.forward(spans).hidden is None
    runner.close()


def test_copied_block_and_rollback_leave_the_parent_alone() -> None:
    model = tiny_model("qwen3")
    ids = prompts()[2]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    runner = Runner(model, "tiny")
    runner.allocate(16, BLOCK)
    parent = [9, 2, 14, 5, 11, 0, 7]
    runner.forward([SpanInput(ids[:18], 0, parent, [])])
    child = [*parent[:4], 8, 1, 3]  # shares four full blocks, the fifth is partial
    runner.copy_blocks([(parent[4], child[4])])
    runner.forward([SpanInput([1, 2, 3, 4], 18, child, [])])  # the child goes its own way, then is rolled back
    both = runner.forward([SpanInput(ids[18:], 18, parent, [0, 7]), SpanInput(ids[18:], 18, child, [0, 7])]).logits
    torch.testing.assert_close(both[:2], expected[[18, 25]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[2:], expected[[18, 25]], rtol=1e-4, atol=1e-4)
    runner.close()


def test_alone_equals_in_a_batch() -> None:
    runner = Runner(tiny_model("llama"), "tiny")
    together = decode_packed(runner, prompts())[0]
    alone = [decode_packed(runner, [prompt])[0][0] for prompt in prompts()]
    runner.close()
    assert together == alone


def test_two_runners_of_one_architecture_do_not_meet() -> None:
    first, second = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    expected = [generate(model, prompts()[1])[0] for model in (first, second)]
    runners = [Runner(first, "first"), Runner(second, "second")]
    got = [decode_packed(runner, prompts()[1:2])[0][0] for runner in runners]
    assert got == expected
    for runner in runners:
        runner.close()


def test_bfloat16_stays_near_float32() -> None:
    """bf16 rows are within the rounding of three layers (8 bits) of the same weights in fp32."""
    model = tiny_model("llama").bfloat16()
    exact = tiny_model("llama")
    exact.load_state_dict(model.float().state_dict())
    model.bfloat16()
    ids = prompts()[2]
    with torch.inference_mode():
        expected = exact(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    runner = Runner(model, "tiny")
    assert runner.dtype == torch.bfloat16
    runner.allocate(8, BLOCK)
    logits = runner.forward([SpanInput(ids, 0, range(7), range(26))]).logits
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - expected).norm() / expected.norm()
    assert float(error) < 4 * torch.finfo(torch.bfloat16).eps
    runner.close()


def test_compiled_rows_equal_eager_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(tiny_model("llama", num_hidden_layers=1), "tiny")
    runner.allocate(32, BLOCK)
    runner.forward([SpanInput(ids, 0, range(8 * i, 8 * i + 8), []) for i, ids in enumerate(prompts())])
    cases = [[0], [2], [0, 1], [0, 1, 2]]
    steps = [[SpanInput([5], PROMPTS[i], range(8 * i, 8 * i + 8), [0]) for i in case] for case in cases]
    steps.append([SpanInput([5, 6, 7], 17, range(8, 16), [2]), SpanInput([5, 6], 3, [0, 1], [0, 1])])
    eager = [runner.forward(step, want_hidden=True) for step in steps]
    assert not runner.warm_up(10_000_000)  # a model this small is not worth it
    assert runner.warm_up()
    runner.forward([SpanInput(ids, 0, range(8 * i, 8 * i + 8), []) for i, ids in enumerate(prompts())])
    for step, want in zip(steps, eager):
        got = runner.forward(step, want_hidden=True)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.hidden, want.hidden, rtol=1e-4, atol=1e-4)
    runner.close()


def test_max_model_len_is_the_models_own_at_most() -> None:
    assert Runner(tiny_model("llama"), "tiny", 64).max_model_len == 64
    with pytest.raises(ModelLoadError, match="max_model_len 4096 exceeds the 128 positions"):
        Runner(tiny_model("llama"), "tiny", 4096)


def test_bytes_per_block_count_every_layer() -> None:
    runner = Runner(tiny_model("deepseek_v3"), "tiny")  # keys of 16, values of 12, four heads, three layers, fp32
    assert runner.kv_bytes_per_block(4) == 3 * 4 * (16 + 12) * 4 * 4
    runner.allocate(5, 4)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in runner.layers)
    assert held == 5 * runner.kv_bytes_per_block(4)
    runner.close()


def test_a_forward_may_want_no_rows_at_all() -> None:
    """A prefill chunk alone, in the dtype that models are served in: nothing goes through the head."""
    runner = Runner(tiny_model("llama").to(torch.bfloat16), "m", compile=False)
    runner.allocate(8, BLOCK)
    rows = runner.forward([SpanInput([1] * 20, 0, [0, 1, 2, 3, 4], [])], want_hidden=True)
    assert rows.logits.shape == (0, runner.width)
    again = runner.forward([SpanInput([1], 20, [0, 1, 2, 3, 4, 5], [0])])
    assert bool(torch.isfinite(again.logits).all())
    runner.close()
