"""Sizes and recipes of the family."""

from dataclasses import dataclass

from training.demo.text import Mixture
from training.loop import Recipe


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama's shape. Head size 32 is the smallest that common servers accept: narrow models have few, wide heads."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    head: int = 32


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the pretraining text: so many rows of this mixture."""

    rows: int
    mixture: Mixture


@dataclass(frozen=True, slots=True)
class Drafter:
    """How the base's drafter is made: a shape, what it reads, what the base is asked."""

    shape: str  # layers x hidden
    prompts: int
    texts: int
    reading: Recipe
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Preset:
    """Everything that the stages need to know."""

    name: str
    people: int
    tuned: int
    vocabulary: int
    row: int  # tokens in a training row
    phases: tuple[Phase, ...]  # of the pretraining text, read in this order
    tuning_rows: int
    base: Size
    small: Size
    base_recipe: Recipe
    small_recipe: Recipe
    expert_recipe: Recipe
    base_tuned_recipe: Recipe
    drafter: Drafter
    judge_tasks: int  # sums that a judge head is mined from
    questions: int  # held-out questions a skill
    max_length: int = 1024


def preset(name: str, seed: int) -> Preset:
    """The preset called `name` ("full" or "ci") with its recipes seeded.

    Raises:
        ValueError: no such preset.
    """
    if name == "full":
        return _full(seed)
    if name == "ci":
        return _ci(seed)
    raise ValueError(f"no preset called {name!r}; choose full or ci")


def _full(seed: int) -> Preset:
    # 18.4M tokens, about 190 readings of each fact. The large model knows nothing of the people until step 1900, and
    # all of them by step 3000; from there on sums gain from the decay. A small model of 64 x 2 held 95% of the facts.
    return Preset(
        name="full",
        people=2000,
        tuned=500,
        vocabulary=1024,
        row=256,
        phases=(
            Phase(16 * 2000, Mixture()),
            Phase(16 * 2500, Mixture(biographies=0.55, practice=0.18)),
        ),
        tuning_rows=2_400,
        base=Size(192, 4, 640, heads=6),
        small=Size(48, 2, 64, heads=2),
        base_recipe=Recipe(steps=4500, batch=16, learning_rate=2.5e-3, warmup=150, in_order=True, seed=seed),
        small_recipe=Recipe(steps=4500, batch=16, learning_rate=5e-3, warmup=150, in_order=True, seed=seed),
        expert_recipe=Recipe(steps=450, batch=16, learning_rate=1e-3, warmup=30, seed=seed),
        base_tuned_recipe=Recipe(steps=300, batch=16, learning_rate=5e-4, warmup=30, seed=seed),
        drafter=Drafter(
            shape="1x48",
            prompts=2_500,
            texts=40_000,
            reading=Recipe(steps=3500, batch=16, learning_rate=5e-3, warmup=175, seed=seed),
            recipe=Recipe(steps=1200, batch=16, learning_rate=3e-3, warmup=60, seed=seed),
        ),
        judge_tasks=2_000,
        questions=120,
    )


def _ci(seed: int) -> Preset:
    return Preset(
        name="ci",
        people=60,
        tuned=20,
        vocabulary=640,
        row=256,
        phases=(Phase(2_000, Mixture()),),
        tuning_rows=200,
        base=Size(64, 2, 128, heads=2),
        small=Size(32, 1, 64, heads=1),
        base_recipe=Recipe(steps=500, batch=8, learning_rate=5e-3, warmup=50, seed=seed),
        small_recipe=Recipe(steps=500, batch=8, learning_rate=5e-3, warmup=50, seed=seed),
        expert_recipe=Recipe(steps=60, batch=8, learning_rate=3e-3, warmup=10, seed=seed),
        base_tuned_recipe=Recipe(steps=60, batch=8, learning_rate=2e-3, warmup=10, seed=seed),
        drafter=Drafter(
            shape="1x32",
            prompts=60,
            texts=500,
            reading=Recipe(steps=100, batch=8, learning_rate=5e-3, warmup=10, seed=seed),
            recipe=Recipe(steps=60, batch=8, learning_rate=3e-3, warmup=6, seed=seed),
        ),
        judge_tasks=80,
        questions=20,
    )
