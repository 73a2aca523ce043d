"""What the checks of several processes share: a zoo of parameters, and the meshes of a world of four."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

# (shape, cut dimension or None for replicas, role, split)
ZOO = [
    ((5, 3), 0, None, None),
    ((1, 7), 0, None, None),
    ((7, 1), 0, None, None),
    ((7, 1), 1, None, None),
    ((3, 3), 0, None, None),
    *3 * [((8, 6), 0, None, None)],
    ((8, 6), 1, None, None),
    ((5, 11), 1, None, None),
    ((3, 3), None, None, None),
    ((12, 5), 0, None, 3),
    ((12, 5), 0, None, (2, 7, 3)),
    ((12, 5), 1, None, (2, 7, 3)),
    ((5, 4, 6), 0, None, None),
    ((5, 4, 6), 0, None, 2),
    ((5, 4, 6), 1, None, (1, 3)),
    ((5, 4, 6), 2, None, 2),
    ((2, 3, 4, 6), 0, "experts", None),
    ((2, 3, 4, 6), 1, "experts", None),
    ((2, 3, 4, 6), 3, "experts", None),
    ((5, 3, 2, 2), 0, "conv", None),
    ((5, 3, 2, 2), 1, "conv", None),
]


def here(tensor, dim):
    return tensor


def placed(tensor, mesh, placements):
    """Cut a tensor that every process has, so that nothing is sent."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def cut_over(mesh):
    return lambda tensor, dim: placed(tensor, mesh, [Replicate() if dim is None else Shard(dim)])


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def assert_same_everywhere(tensors, group=None):
    for tensor in tensors:
        copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(copies, tensor.detach().contiguous(), group=group)
        assert all(torch.equal(copy, copies[0]) for copy in copies)


class World:
    def __init__(self, folder):
        self.folder, self.rank = folder, dist.get_rank()
        self.four = init_device_mesh("cpu", (4,))
        self.grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        pairs = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
        self.pair = pairs[self.rank // 2]
