"""Next word and next patch: the sum, the denominator, and measures that mean what they are called."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.data.captions import VOCABULARY, CaptionsConfig, Sentences
from danlu.models import TextImage, TextImageConfig
from danlu.nn import GQAConfig
from danlu.objectives import Captioning, CaptioningConfig, evaluate


def build() -> tuple[Captioning, Sentences]:
    torch.manual_seed(4)
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    sentences = Sentences(images, torch.arange(20) % 10, CaptionsConfig(patch=2, digits=2), name="test")
    config = TextImageConfig(
        vocab_size=len(VOCABULARY), patch_values=4, dim=16, layers=1, hidden=24, attention=GQAConfig(num_heads=2)
    )
    return Captioning(TextImage(config), CaptioningConfig(patch_weight=3.0)), sentences


def test_loss_is_cross_entropy_of_words_plus_weighted_squared_error_of_patches() -> None:
    objective, sentences = build()
    batch = sentences.batch(range(9))
    x = objective.model.read(batch["tokens"], batch["patches"], batch["grid"])
    words, patches = x @ objective.model.head_weight.T, objective.model.patch_out(x)
    expected, targets = torch.zeros(()), 0
    for row, time in batch["draws"].nonzero().tolist():
        expected = expected + 3.0 * F.mse_loss(patches[row, time], batch["patches"][row, time + 1])
        targets += 1
    for row, time in (batch["targets"] != -100).nonzero().tolist():
        expected = expected + F.cross_entropy(words[row, time], batch["targets"][row, time])
        targets += 1
    torch.testing.assert_close(objective(batch), expected)
    assert objective.denominator(batch).item() == targets


def test_caption_accuracy_is_that_of_greedy_decoding() -> None:
    objective, sentences = build()
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    for step in range(60):  # until some captions are right and some are not
        optimizer.zero_grad()
        objective(sentences.batch(range(16 * step, 16 * step + 16))).backward()
        optimizer.step()
    batch = sentences.batch(range(40))
    batch = {name: tensor[~batch["draws"].any(-1)] for name, tensor in batch.items()}
    asked = batch["targets"] != -100
    complete = 0
    for row in range(len(asked)):
        tokens = batch["tokens"][row : row + 1].clone()
        right = True
        for time in asked[row].nonzero()[:, 0].tolist():
            one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            x = objective.model.read(tokens, one["patches"], one["grid"])[0, time]
            tokens[0, time + 1] = (objective.model.head_weight @ x).argmax()
            right &= bool(tokens[0, time + 1] == batch["targets"][row, time])
        complete += right
    found = evaluate(objective, [batch])
    assert 0 < complete < len(asked)
    assert found["val_caption_accuracy"] == pytest.approx(complete / len(asked))
    assert set(found) == {"val_loss", "val_caption_accuracy", "val_word_accuracy"}


def test_patch_error_is_one_for_the_mean_patch_and_zero_for_the_right_one() -> None:
    objective, sentences = build()
    batch = sentences.batch(range(50))
    wanted = batch["patches"].roll(-1, 1)
    mean = wanted[batch["draws"]].mean(0)

    class Known(torch.nn.Module):
        out_features = 4

        def __init__(self, answer: Tensor) -> None:
            super().__init__()
            self.answer = answer

        def forward(self, x: Tensor) -> Tensor:
            return self.answer.expand(*x.shape[:-1], 4)

    for answer, expected in [(mean, 1.0), (wanted, 0.0)]:
        objective.model.patch_out = Known(answer)  # type: ignore[assignment]
        assert evaluate(objective, [batch])["val_patch_error"] == pytest.approx(expected, abs=1e-6)


def test_evaluating_nothing_is_rejected_and_a_negative_weight_too() -> None:
    objective, _ = build()
    with pytest.raises(ValueError, match="must hold words and patches"):
        evaluate(objective, [])
    with pytest.raises(ValueError, match="patch_weight"):
        Captioning(objective.model, CaptioningConfig(patch_weight=-1.0))


def test_the_validation_loss_is_the_loss_per_target() -> None:
    objective, sentences = build()
    batch = sentences.batch(range(9))
    expected = objective.eval()(batch) / objective.denominator(batch)
    assert evaluate(objective, [batch])["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
