"""Quanta from gradients: the angle between the gradients of samples, and the tasks that its clusters find."""

import pytest
import torch
from tensors import gaussian
from torch import nn

from danlu.analysis import angular_similarity, sample_gradients


def test_similarity_is_the_angle_whatever_the_length() -> None:
    angles = torch.tensor([0.0, 30.0, 60.0, 90.0, 135.0, 180.0], dtype=torch.float64).deg2rad()
    rows = torch.stack((angles.cos(), angles.sin()), 1) * torch.tensor([1.0, 1e-9, 3.0, 1e9, 2.0, 5.0])[:, None]
    expected = 1 - (angles[:, None] - angles).abs() / torch.pi
    torch.testing.assert_close(angular_similarity(rows), expected, rtol=0, atol=1e-7)


def test_equal_gradients_are_exactly_alike_and_rounding_leaves_no_nan() -> None:
    rows = gaussian(1, 999, dtype=torch.float32).expand(40, -1) * torch.linspace(0.1, 3, 40)[:, None]
    found = angular_similarity(rows)
    assert found.diagonal().eq(1).all()
    assert found.min() > 0.999
    zero = angular_similarity(torch.cat((rows[:1], torch.zeros(1, 999))))
    assert zero[0, 1].item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="gradients must be"):
        angular_similarity(torch.zeros(3))


def test_the_gradient_of_each_sample_is_that_of_a_backward_pass_for_it_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = gaussian(6, 5), torch.randint(3, (6,))
    parameters = {name: weight.detach() for name, weight in network.named_parameters() if name.startswith("0")}

    def loss(some: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(network, some, (x,)), y)

    found = sample_gradients(loss, parameters, x, y, chunk=4)
    for row, one, label in zip(found, x, y):
        taken = torch.autograd.grad(nn.functional.cross_entropy(network(one), label), list(network[0].parameters()))
        torch.testing.assert_close(row, torch.cat([part.flatten() for part in taken]), rtol=1e-12, atol=1e-15)


def test_clusters_of_the_similarity_are_the_tasks_that_use_different_inputs() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    torch.manual_seed(1)
    tasks, each, inputs = 4, 15, 6
    # Each task has inputs of its own, all of one sign, and a target that the untrained network underrates.
    x = torch.zeros(tasks * each, tasks * inputs, dtype=torch.float64)
    for task in range(tasks):
        x[task * each : (task + 1) * each, task * inputs : (task + 1) * inputs] = gaussian(each, inputs).abs() + 0.2
    y = torch.ones(tasks * each, dtype=torch.float64)
    parameters = {"w": 0.01 * gaussian(tasks * inputs, seed=2)}
    gradients = sample_gradients(lambda p, x, y: nn.functional.softplus(-y * (x @ p["w"])), parameters, x, y)
    similarity = angular_similarity(gradients)
    model = cluster.SpectralClustering(tasks, affinity="precomputed", random_state=0)
    labels = torch.as_tensor(model.fit_predict(similarity.numpy())).view(tasks, each)
    assert (labels == labels[:, :1]).all()
    assert len(labels[:, 0].unique()) == tasks
