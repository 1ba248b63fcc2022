"""The loss against its closed form, and its invariants."""

import math

import torch

from training.losses import cross_entropy


def test_uniform_logits_cost_log_vocabulary() -> None:
    ids = torch.randint(0, 11, (2, 5))
    loss = cross_entropy(torch.zeros(2, 5, 11), ids, torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.tensor(math.log(11)))


def test_known_table() -> None:
    # p(next = 1) = 1/4 after the first token and 3/4 after the second.
    logits = torch.log(torch.tensor([[[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]]))  # [1, 3, 2]
    loss = cross_entropy(logits, torch.tensor([[0, 1, 1]]), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.tensor(-(math.log(0.25) + math.log(0.75)) / 2))


def test_only_targets_count() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 6, 7), torch.randint(0, 7, (3, 6))
    targets = torch.zeros(3, 6, dtype=torch.bool)
    targets[1, 4] = True
    expected = -torch.log_softmax(logits[1, 3], -1)[ids[1, 4]]
    torch.testing.assert_close(cross_entropy(logits, ids, targets), expected)
    assert cross_entropy(logits, ids, torch.zeros_like(targets)) == 0


def test_a_constant_added_to_logits_changes_nothing() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 6, 7), torch.randint(0, 7, (2, 6))
    targets = torch.rand(2, 6) < 0.5
    # fp32 keeps 24 bits: adding 8 costs at most 8 * 2^-23 a logit.
    torch.testing.assert_close(
        cross_entropy(logits + 8, ids, targets), cross_entropy(logits, ids, targets), atol=1e-5, rtol=0
    )
