"""Sampling: limits hold, and the distribution is the model's."""

import torch

from danlu.models import penalized, sample_token


def test_drawn_frequencies_follow_the_tempered_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([sample_token(logits, temperature=0.5, generator=g) for _ in range(4000)])
    expected = (logits / 0.5).softmax(-1)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 4000, expected, rtol=0, atol=0.03)


def test_top_k_and_top_p_keep_only_the_most_likely_tokens() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    g = torch.Generator().manual_seed(0)
    assert {int(sample_token(logits, top_k=2, generator=g)) for _ in range(200)} == {1, 3}
    assert {int(sample_token(logits, top_p=0.69, generator=g)) for _ in range(200)} == {1, 3}
    assert {int(sample_token(logits, top_p=0.71, generator=g)) for _ in range(200)} == {1, 2, 3}
    assert {int(sample_token(logits, top_p=1e-9, generator=g)) for _ in range(20)} == {1}


def test_min_p_keeps_what_is_likely_enough_beside_the_most_likely_token() -> None:
    logits = torch.tensor([0.1, 0.4, 0.19, 0.31]).log()
    g = torch.Generator().manual_seed(0)
    assert {int(sample_token(logits, min_p=0.5, generator=g)) for _ in range(200)} == {1, 3}
    assert {int(sample_token(logits, min_p=0.45, generator=g)) for _ in range(200)} == {1, 2, 3}
    assert {int(sample_token(logits, min_p=1.0, generator=g)) for _ in range(20)} == {1}
    kept = torch.stack([sample_token(logits, min_p=0.5, generator=g) for _ in range(4000)]).bincount(minlength=4)
    torch.testing.assert_close(kept / 4000, torch.tensor([0, 0.4, 0, 0.31]) / 0.71, rtol=0, atol=0.03)


def test_a_penalty_lowers_used_tokens_of_either_sign_and_no_other() -> None:
    logits = torch.randn(3, 29)
    used = torch.rand(3, 29) < 0.5
    lowered = penalized(logits, used, 1.3)
    assert (lowered < logits)[used].all()
    assert torch.equal(lowered[~used], logits[~used])
    assert torch.equal(penalized(logits, used, 1.0), logits)
    torch.testing.assert_close(penalized(lowered, used, 1 / 1.3), logits)
