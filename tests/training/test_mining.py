"""Mining on scripted models, where it is known which drafts matter; hidden states against the engine's own."""

from collections.abc import Sequence

import pytest
import torch

from decoding.core import Sampling
from decoding.hosting import SpanInput
from decoding.runner import Runner
from tests.fakes import TableModel, byte_tokenizer, random_table, table_engine
from tests.tiny import VOCAB, tiny_model
from training.chats import Ids
from training.mining import Answers, Label, greedy_choices, last_hidden, last_number, mine, whole_text
from training.writer import write

END = 0


def ids(text: str) -> Ids:
    """ "." is the end token, every other character its code."""
    return tuple(END if character == "." else ord(character) for character in text)


def decode(tokens: Ids) -> str:
    return "".join(chr(token) for token in tokens if token != END)


def target_next(answer: str) -> str:
    """A filler, a 4, a filler, "=", one more than the digit, the end."""
    place = len(answer)
    return ("x", "4", "x", "=")[place] if place < 4 else str(int(answer[1]) + 1) if place == 4 else "."


class Script:
    """A target that goes by `target_next` after a one-character prompt, and a drafter that errs in given places."""

    def __init__(self, errors: dict[int, str]) -> None:
        self.errors = errors
        self.finished: list[Ids] = []

    def finish(self, prefixes: Sequence[Ids], room: Sequence[int]) -> list[Ids]:
        self.finished += prefixes
        tails = []
        for prefix, most in zip(prefixes, room, strict=True):
            answer = whole = decode(prefix)[1:]
            while len(whole) - len(answer) < most and not whole.endswith("."):
                whole += target_next(whole)
            tails.append(ids(whole[len(answer) :]))
        return tails

    def draft(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[list[int]]:
        return [
            [ids(self.errors.get(i, target_next(decode(answer[:i]))))[0] for i in range(len(answer))]
            for _, answer in pairs
        ]


ANSWERS = Answers(decode, last_number, frozenset({END}), max_tokens=12)


def test_a_harmless_draft_is_kept_and_a_harmful_one_is_not() -> None:
    script = Script({0: "y", 1: "7", 2: "z"})
    (walk,) = mine([ids("q")], ANSWERS, script.finish, script.draft)
    assert walk.wanted == "5"
    # The filler "y" stays for what follows; after it the 7 would make the answer 8, so the 4 stays; then "z" stays.
    assert walk.labels == [Label(ids("qy"), True), Label(ids("qy7"), False), Label(ids("qy4z"), True)]
    assert walk.text == ids("y4z=5.")


def test_the_answer_itself_and_an_early_end_matter() -> None:
    script = Script({2: ".", 4: "9"})
    (walk,) = mine([ids("q")], ANSWERS, script.finish, script.draft)
    assert walk.labels == [Label(ids("qx4."), False), Label(ids("qx4x=9"), False)]
    assert walk.text == ids("x4x=5.")
    assert ids("qx4.") not in script.finished  # an answer that has ended is not finished again


def test_no_difference_no_labels_and_prompts_keep_their_order() -> None:
    script = Script({})
    walks = mine([ids("q"), ids("r")], ANSWERS, script.finish, script.draft)
    assert [walk.prompt for walk in walks] == [ids("q"), ids("r")]
    assert all(walk.labels == [] for walk in walks)


def test_without_a_final_answer_nothing_is_learned() -> None:
    script = Script({0: "y"})
    never = Answers(decode, lambda _: None, frozenset({END}), max_tokens=12)
    (walk,) = mine([ids("q")], never, script.finish, script.draft)
    assert walk.labels == []
    assert walk.wanted is None


def test_nothing_behind_a_stop_string_is_read() -> None:
    stopped = Answers(decode, last_number, frozenset({END}), stop="=", max_tokens=12)
    script = Script({1: "7", 2: "=", 4: "9"})
    (walk,) = mine([ids("q")], stopped, script.finish, script.draft)
    assert walk.wanted == "4"
    assert walk.labels == [Label(ids("qx7"), False), Label(ids("qx4="), True)]
    assert walk.text == ids("x4=")


def test_cut() -> None:
    answers = Answers(decode, last_number, frozenset({END}), stop="==", max_tokens=6)
    assert answers.cut(ids("ab.cd")) == ids("ab.")
    assert answers.cut(ids("a==b")) == ids("a==")
    assert answers.cut(ids("abcdefgh")) == ids("abcdef")
    assert answers.cut(ids("a=b")) == ids("a=b")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("47 + 85 = 132. The answer is 132.", "132"),
        ("about 1,200 of them", "1200"),
        ("x = -3.5", "-3.5"),
        ("so 12.", "12"),
        ("none", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_whole_text() -> None:
    assert whole_text(" a b\n") == "a b"
    assert whole_text(" \n") is None


def test_choices_are_the_models_own_in_every_place() -> None:
    model = tiny_model("llama", 1)
    pairs = [((5, 6), (7, 8, 9)), ((3,), (1, 2)), ((4, 4, 4), (9,))]
    found = greedy_choices(model, pairs, batch=2)
    for (prompt, answer), choices in zip(pairs, found, strict=True):
        for i in range(len(answer)):
            context = torch.tensor([[*prompt, *answer[:i]]])
            assert choices[i] == int(model(input_ids=context).logits[0, -1].argmax())


@pytest.mark.parametrize("arch", ["llama", "minicpm3", "gemma2", "opt"])
def test_hidden_states_are_those_of_a_verify_pass(arch: str) -> None:
    model = tiny_model(arch)
    contexts = [tuple((7 * i + j) % VOCAB for j in range(n)) for i, n in enumerate((5, 9, 5, 2, 13))]
    found = last_hidden(model, contexts, batch=2)
    runner = Runner(tiny_model(arch), "m", 64, compile=False)
    runner.allocate(8, 16)
    spans = [SpanInput(context, 0, [i], range(len(context) - 1, len(context))) for i, context in enumerate(contexts)]
    own = runner.forward(spans, want_hidden=True).hidden
    assert own is not None
    # fp32 sums of some tens of products in another order; another position's state differs in the first digit.
    torch.testing.assert_close(found, own, atol=1e-4, rtol=1e-4)


def test_the_target_writes_what_its_table_says() -> None:
    """Greedy is the chain of best tokens; a seed gives the same text alone and in a batch, and other seeds others."""
    table = random_table(0, n=257)
    engine = table_engine({"target": TableModel("target", table)})
    prompts = [(5, 6), (7,), (9, 9)]
    greedy = write(engine, prompts, [Sampling(temperature=0, max_tokens=8)] * 3)
    for prompt, written in zip(prompts, greedy, strict=True):
        token = prompt[-1]
        for chosen in written:
            token = int(table[token % len(table)].argmax())
            assert chosen == token
    seeds = [Sampling(seed=seed, max_tokens=8) for seed in (1, 2, 3)]
    together = write(engine, [prompts[0]] * 3, seeds)
    assert len(set(together)) == 3
    assert write(engine, [prompts[0]], seeds[1:2]) == [together[1]]
    with pytest.raises(ValueError, match="cannot be completed"):
        write(engine, [(1,) * 600], [Sampling(max_tokens=8)])
    assert byte_tokenizer().eos_token_id not in together[1][:-1]
