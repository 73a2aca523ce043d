import pytest
import torch

from danlu.linalg.lowrank import anncur

D = torch.float64


@pytest.fixture
def scores(make):
    """60 queries x 500 items with a fast spectrum, as cross-encoder scores have."""
    return make(60, 500, 0.6 ** torch.arange(60.0))


def test_completion_is_exact_on_scores_of_the_rank_of_the_anchors(low_rank, generator):
    S = low_rank(40, 300, 5)
    index = anncur(S[:20], 5, generator=generator)
    assert torch.allclose(index.complete(S[20:, index.items]), S[20:], atol=1e-9)


def test_weights_are_the_cached_product_of_the_definition(scores, generator):
    index = anncur(scores[:40], 8, generator=generator)
    G = torch.linalg.pinv(scores[:40][:, index.items])
    assert torch.allclose(index.weights, G @ scores[:40], atol=1e-9)


def test_search_finds_the_best_items_with_few_exact_scores(scores, generator):
    index = anncur(scores[:40], 12, generator=generator)
    hits = 0
    for query in scores[40:]:
        asked = []

        def score(items, query=query, asked=asked):
            asked.extend(items.tolist())
            return query[items]

        items, values = index.search(score, top=5, candidates=30)
        assert len(asked) == len(set(asked)) == 12 + 30
        assert torch.equal(values, query[items])
        assert (values.diff() <= 0).all()
        hits += len(set(items.tolist()) & set(query.topk(5).indices.tolist()))
    assert hits >= 0.95 * 100
    random = torch.randperm(500, generator=generator)[:42]
    assert len(set(random.tolist()) & set(scores[40].topk(5).indices.tolist())) < 5


def test_search_over_all_items_is_the_exact_ranking(scores, generator):
    index = anncur(scores[:40], 6, generator=generator)
    items, _ = index.search(lambda i: scores[41, i], top=7, candidates=500)
    assert items.tolist() == scores[41].topk(7).indices.tolist()


def test_anchors_may_be_given_or_chosen_by_another_rule(scores):
    assert anncur(scores, items=torch.tensor([3, 1])).items.tolist() == [3, 1]
    by_pivots, by_chance = (
        anncur(scores, 8, method=method, generator=torch.Generator().manual_seed(0)).error
        for method in ("cpqr", "uniform")
    )
    assert by_pivots < by_chance


def test_bad_input_is_named(scores):
    with pytest.raises(ValueError, match="anchors must be given, or items"):
        anncur(scores)
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 60, got 61"):
        anncur(scores, 61)
    with pytest.raises(ValueError, match="scores must be a matrix"):
        anncur(scores[0], 1)
    index = anncur(scores, 3)
    with pytest.raises(ValueError, match=r"scores must be \(…, 3\)"):
        index.complete(torch.ones(4, dtype=D))
    with pytest.raises(ValueError, match="candidates must be an integer from 5 to 500, got 3"):
        index.search(lambda i: i.double(), top=5, candidates=3)
