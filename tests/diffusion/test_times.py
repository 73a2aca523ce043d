"""Times of training: functions of keys, or of torch's generator where there are none, with the law that is stated."""

import pytest
import torch
from scipy import stats

from danlu._draws import fresh
from danlu.diffusion import Flow, LogitNormalTimes, LogNormalNoise, UniformTimes

CPU = torch.device("cpu")
LAWS = {
    UniformTimes(low=0.2, high=0.7): stats.uniform(0.2, 0.5).cdf,
    LogitNormalTimes(mean=0.5, std=2.0): lambda t: stats.norm(0.5, 2.0).cdf(torch.logit(torch.as_tensor(t)).numpy()),
    LogNormalNoise(mean=-0.3, std=0.8): lambda t: stats.norm(-0.3, 0.8).cdf(torch.logit(torch.as_tensor(t)).numpy()),
}


@pytest.mark.parametrize("times", LAWS, ids=lambda times: type(times).__name__)
def test_times_follow_their_law_and_depend_on_their_keys_or_else_on_the_generator(times) -> None:
    def drawn(seed: int) -> torch.Tensor:
        return times.draw(20_011, Flow(), device=CPU, generator=torch.Generator().manual_seed(seed))

    t = drawn(5)
    assert t.dtype == torch.float32
    assert stats.kstest(t.double().numpy(), LAWS[times]).pvalue > 1e-4
    assert torch.equal(t, drawn(5))
    assert not torch.equal(t, drawn(6))
    keys = fresh(7, device=CPU)
    found = times.draw(7, Flow(), device=CPU, keys=keys)
    assert torch.equal(found.flip(0), times.draw(7, Flow(), device=CPU, keys=keys.flip(0)))
