"""What a layer declares about its parameters stays true however the parameters are replaced."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from danlu._roles import declaration, declare
from danlu.nn import MoE, MoEConfig
from danlu.optim import Muon, param_groups
from danlu.optim import declare as declare_of_optim


class Net(nn.Module):
    """A layer of torch's with a declaration that no guess would make, and a layer of danlu's."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8, bias=False)
        declare(self.first, "weight", "matrix", split=(5, 3))
        self.experts = MoE(8, MoEConfig(hidden=4))

    def forward(self, x):
        return self.experts(self.first(x))


def sorted_out(model):
    return [(group["role"], group["split"], group["param_names"]) for group in param_groups(model)]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("mesh") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


EXPECTED = [
    ("matrix", None, ["experts.router"]),
    ("matrix", (5, 3), ["first.weight"]),
    ("experts", None, ["experts.w_down"]),
    ("experts", 2, ["experts.w_up"]),
]


def routed_only(model):
    """Leave out the shared expert, of whose layers nothing unusual is declared."""
    return [
        (role, split, kept)
        for role, split, names in sorted_out(model)
        if (kept := [name for name in names if "shared" not in name])
    ]


def test_declarations_survive_fully_shard(mesh):
    model = Net()
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert not hasattr(model.first.weight, "danlu_role")  # the parameter is another one
    assert routed_only(model) == EXPECTED


def test_declarations_survive_parallelize_module(mesh):
    model = Net()
    parallelize_module(model, mesh, {"first": ColwiseParallel()})
    assert not hasattr(model.first.weight, "danlu_role")
    assert routed_only(model) == EXPECTED


def test_declarations_survive_the_meta_device_and_to_empty():
    with torch.device("meta"):
        model = Net()
    assert routed_only(model.to_empty(device="cpu")) == EXPECTED


def test_declarations_survive_a_deep_copy_and_are_the_copys_own():
    model = Net()
    twin = copy.deepcopy(model)
    assert routed_only(twin) == EXPECTED
    declare(twin.first, "weight", "head")
    assert declaration(model.first, "weight") == ("matrix", (5, 3), False)


def test_declarations_survive_torch_compile():
    compiled = torch.compile(Net(), backend="eager")
    names = [(role, split, [name.removeprefix("_orig_mod.") for name in n]) for role, split, n in routed_only(compiled)]
    assert names == EXPECTED


def test_a_bare_parameter_still_tells_its_split_to_an_optimizer():
    layers = [nn.Linear(6, 8, bias=False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    declare(layers[0], "weight", "matrix", split=(5, 3))
    for layer, options in zip(layers, ({}, {"split": (5, 3)})):
        optimizer = Muon([{"params": [layer.weight], **options}])
        layer.weight.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        optimizer.step()
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_what_stands_on_the_parameter_itself_overrides_the_layer():
    model = Net()
    model.first.weight.danlu_role = "head"
    assert ("head", (5, 3), ["first.weight"]) in sorted_out(model)


def test_there_is_one_declare():
    import danlu.nn

    assert danlu.nn.declare is declare is declare_of_optim


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ((nn.Parameter(torch.zeros(2, 2)), "weight", "matrix"), TypeError, "module must be .*got Parameter"),
        ((nn.Linear(2, 2), "wieght", "matrix"), ValueError, "parameter of the Linear itself, got 'wieght'"),
        ((nn.Sequential(nn.Linear(2, 2)), "0.weight", "matrix"), ValueError, "parameter of the Sequential itself"),
        ((nn.Linear(2, 2), "weight", "matrx"), ValueError, "did you mean 'matrix'"),
        ((nn.Linear(2, 2), "bias", "matrix"), ValueError, r"bias is declared 'matrix', which its shape \(2,\)"),
        ((nn.Linear(4, 6), "weight", "matrix", (4, 3)), ValueError, r"sum to its 6 rows, got \(4, 3\)"),
    ],
)
def test_a_declaration_that_cannot_be_is_an_error_that_names_it(arguments, kind, says):
    with pytest.raises(kind, match=says):
        declare(*arguments)


def written(model):
    """Return {name without wrappers: (role, split, orientation)}."""
    return {
        name.removeprefix("module."): (group["role"], group["split"], group["transposed"])
        for group in param_groups(model)
        for name in group["param_names"]
    }


SIZES = {"vocab_size": 33, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2}
PUBLIC = {
    "Phi3ForCausalLM": {**SIZES, **HEADS},
    "GptOssForCausalLM": {**SIZES, **HEADS},
    "GPT2LMHeadModel": {"vocab_size": 33, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_roles_of_public_architectures_survive_fully_shard_and_data_parallelism(name, mesh):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**PUBLIC[name]))
    before = written(model)
    assert any(split or transposed for _, split, transposed in before.values())
    assert written(nn.parallel.DistributedDataParallel(model)) == before
    inside = [module for module in model.modules() if type(module).__name__.endswith(("Attention", "MLP", "Experts"))]
    for module in reversed(inside):
        fully_shard(module, mesh=mesh)
        assert type(module).__name__.startswith("FSDP")
    fully_shard(model, mesh=mesh)
    assert written(model) == before
