"""Muon: momentum whose singular values are all set to one, for every linear map of a network.

    M <- mu M + (1 - mu) G
    O <- msign(mu M + (1 - mu) G)            (Nesterov; msign(M) without)
    W <- (1 - lr * weight_decay) W - lr * s(shape) * O

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al., "Muon is Scalable
for LLM Training", arXiv:2502.16982, section 2 (decay and the scale ``moonlight``); Amsel et al., "The Polar Express",
arXiv:2505.16932 (the iteration).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu._roles import ATTRIBUTES, MATRIX_ROLES, ROLES
from danlu._validate import choice, integer, number
from danlu.approx import Composition
from danlu.optim._base import MomentumOptimizer
from danlu.optim._common import check_rate, is_dtensor
from danlu.optim._config import by_role, dtype_of, probe
from danlu.optim._gathered import gathered, once_sharded
from danlu.optim._layout import layout, parts
from danlu.optim._sharded import local, sharing_group
from danlu.optim.adamw import AdamWConfig
from danlu.optim.combined import CombinedOptimizer
from danlu.optim.decay import check_decay, decay_
from danlu.optim.groups import param_groups
from danlu.optim.muon_step import SCALES, Iteration, Options, Plan, composition_of, muon_, muon_plan
from danlu.optim.rounding import check_rounding, watch_resolution

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_ROLE, _SPLIT, _TURNED = ATTRIBUTES
_PLAIN = frozenset((Tensor, nn.Parameter))


def _any_dtensor(params: list[Tensor]) -> bool:
    """Say whether one is a DTensor, of thousands of plain ones by their types."""
    return not _PLAIN.issuperset(map(type, params)) and any(map(is_dtensor, params))


class Muon(MomentumOptimizer):
    """Momentum orthogonalised by matrix products, for matrices, stacks of expert matrices and convolutions.

    Embeddings, heads, gains and biases are no linear maps between activations: give them to AdamW
    (:class:`MuonConfig` does). Equal shapes are stacked and iterated together. Nothing in ``step``
    waits for the device, gradients are left unmodified, and the result does not depend on the scale of the loss.

    Args:
        params: parameters, named parameters or groups. A group may carry, besides every option below,
            ``role`` (``matrix``; ``experts``: leading dimensions count matrices; ``conv``: trailing dimensions are
            flattened) and ``split`` (rows orthogonalised apart: a number of equal blocks or a tuple of heights) and
            ``transposed`` (kept as inputs by outputs; rows are outputs all the same).
            Where it does not, the parameter's ``danlu_role``, ``danlu_split`` and ``danlu_transposed`` hold, then its
            shape: 2-D is a matrix, 3-D a stack.
        lr: learning rate, a number or a one-element tensor.
        momentum: decay of the momentum, in [0, 1).
        nesterov: look one step ahead.
        weight_decay: decoupled decay; the weights shrink by ``lr * weight_decay`` each step. It bounds the spectral
            norm of the weights by about ``s(shape) / weight_decay``.
        decay: what ``weight_decay`` shrinks: ``decoupled`` all singular values, ``spectral`` the largest one,
            ``clipped`` what they have above ``decay_bound`` (see :func:`danlu.optim.decay_`). The latter two act on
            each matrix by itself, need complete parameters and wait for the device; ``clipped`` costs an
            eigendecomposition a matrix.
        decay_bound: of ``clipped``: singular values up to it are left alone.
        scale: factor by shape, see :func:`shape_scale`. ``rms`` makes the root mean square of every update 0.2
            exactly, whatever the iteration leaves of the smallest singular values; ``moonlight`` gives
            0.2 for an exact polar factor and a few per cent less for a real one.
        ema: average gradients (True) or sum them (False). The step is the same as long as ``momentum`` is.
        maximize: climb instead of descending.
        method: ``auto``; ``fast``, a tenth quicker at about twice the error, which is still below that of Jordan's
            five steps; a name of :func:`danlu.approx.published`; or any :class:`danlu.approx.Composition`.
        steps: number of polynomials; None for what ``method`` is made for (5 for ``auto``).
        dtype: dtype of the iteration. None: float64 for float64 parameters, otherwise the faster of bfloat16 and
            float32 on the device. In bfloat16 the update has a relative error of about 1e-2.
        momentum_dtype: dtype of the momentum; None for the parameter's own.
        chunk_bytes: bytes of one stack in the iteration, which needs up to about fifteen times as much for square
            matrices. None: 4 MiB on a CPU, where a stack should stay in cache, and unlimited
            elsewhere. Where it is given, each process also sends and receives about that much at a time.
        foreach: update momenta and weights by fused multi-tensor calls. None: not on a CPU, where a loop is faster.
        process_group: processes that hold replicas of the parameters and their gradients, as under
            DistributedDataParallel: each then iterates a share of the matrices. None: this process does all.
            DTensors (FSDP2) need no group: their matrices are collected, iterated once and scattered in the mesh they
            lie in, and the momentum is sharded as its parameter is. One whose matrices are sharded over two dimensions
            of the mesh is gathered over one of them first.
        rounding: of bfloat16 parameters, ``nearest``, ``stochastic`` or ``compensated``: see docs/optim/rounding.md.
        rounding_seed: of ``stochastic``.

    Raises:
        ValueError, TypeError: naming the argument, or the group and the parameter.

    >>> weight = torch.nn.Parameter(torch.eye(2, 3))
    >>> optimizer = Muon([("weight", weight)], lr=0.1, weight_decay=0.0, scale="plain")
    >>> weight.grad = torch.tensor([[5.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    >>> optimizer.step()
    >>> torch.allclose(weight, 0.9 * torch.eye(2, 3), atol=2e-2)
    True
    """

    slot = "momentum_buffer"
    #: Whether the hooks look at more than one entry of a matrix at a time, so that it may not be sharded itself.
    complete: ClassVar[bool] = False
    own = ("composition", "dtype", "momentum_dtype", "chunk_bytes", "foreach", "process_group")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        decay: str = "decoupled",
        decay_bound: float | None = None,
        scale: str = "moonlight",
        ema: bool = True,
        maximize: bool = False,
        method: str | Composition = "auto",
        steps: int | None = None,
        dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
        chunk_bytes: int | None = None,
        foreach: bool | None = None,
        process_group: Any = None,
        rounding: str = "nearest",
        rounding_seed: int = 0,
    ) -> None:
        for name, value in (("dtype", dtype), ("momentum_dtype", momentum_dtype)):
            if value is not None:
                choice(name, value, _DTYPES)
        if chunk_bytes is not None:
            integer("chunk_bytes", chunk_bytes)
        self.composition = composition_of(method, steps)
        self.dtype, self.momentum_dtype, self.chunk_bytes, self.foreach = dtype, momentum_dtype, chunk_bytes, foreach
        self.process_group = sharing_group(process_group)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "decay": decay,
            "decay_bound": decay_bound,
            "scale": scale,
            "ema": ema,
            "maximize": maximize,
            "role": None,
            "split": None,
            "transposed": None,
            "rounding": rounding,
            "rounding_seed": rounding_seed,
        }
        self._plans: dict[int, tuple[Any, Plan]] = {}
        check_rounding("", defaults)
        self.check_options("", defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

    def check_options(self, where: str, options: Mapping[str, Any]) -> None:
        """Raise unless every option of a group is in its range; ``where`` begins the message."""
        check_rate(where, options["lr"])
        number(f"{where}momentum", options["momentum"], low=0, high=1, high_open=True)
        number(f"{where}weight_decay", options["weight_decay"], low=0)
        check_decay(where, options["decay"], options["decay_bound"])
        choice(f"{where}scale", options["scale"], SCALES)
        if options["role"] is not None:
            choice(f"{where}role", options["role"], MATRIX_ROLES)
        if options["transposed"] not in (None, False, True):
            raise ValueError(f"{where}transposed must be True, False or None, got {options['transposed']!r}")

    def check_parameter(self, name: str, parameter: Tensor, options: Mapping[str, Any]) -> None:
        """Raise if a parameter is no linear map, or its memory has no view as a stack of matrices."""
        laid = layout(name, parameter, options)
        twice = once_sharded(name, parameter, options) is not None
        whole = parameter.detach()
        storage = local(whole).untyped_storage().data_ptr()
        found = [] if twice else list(parts(name, (whole, whole, whole), laid, None))
        if twice or any(part.dim for part in found):
            placed = f"{name} is placed as {getattr(parameter, 'placements', None)}, its matrices sharded; accepted"
            if options.get("decay", "decoupled") != "decoupled":
                raise ValueError(f"{placed} is decay='decoupled' only")
            if self.complete:
                raise ValueError(f"{placed} by {type(self).__name__} are complete matrices only")
        views = [part.tensors[0] for part in found]
        if any(view.numel() and view.untyped_storage().data_ptr() != storage for view in views):
            raise ValueError(f"{name} has strides {parameter.stride()} without a view as a stack of matrices")

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *slots: list[Tensor]) -> None:
        """Update parameters and momenta of a group in place."""
        if not params:
            return
        if self.process_group is not None or _any_dtensor(params):
            self._exchanging(group, params, grads, *slots)
        else:
            self._step(group, params, grads, *slots)

    def _step(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *slots: list[Tensor]) -> None:
        momenta, *others = slots
        options = Options(**{name: group[name] for name in Options._fields})
        if group.get("decay", "decoupled") != "decoupled":  # a state saved before there was a choice has no key
            self._decay(group, params)
            options = options._replace(weight_decay=0.0)
        plan = self._plan(group, params, momenta)
        before, after = partial(self.before_update, group), partial(self.after_update, group)
        muon_(params, grads, momenta, plan, options, *others, before=before, after=after)

    # An exchange that overlaps with work has no place in a graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _exchanging(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *slots: Any) -> None:
        with gathered(params, grads, slots, group) as (whole, directions, state):
            self._step(group, whole, directions, *state)

    def _plan(self, group: dict[str, Any], params: list[Tensor], momenta: list[Tensor]) -> Plan:
        """Return the plan of a group, made anew only when something has changed that it depends on."""
        iteration = Iteration(self.composition, self.dtype, self.chunk_bytes, self.foreach, self.process_group)
        said = {name: group[name] for name in ("role", "split", "transposed")}
        if torch.compiler.is_compiling():  # the graph is the plan
            return muon_plan(params, momenta, iteration, **said)
        # All that a plan is made of: where a parameter lay that is gone, another may lie now.
        everything: list[Any] = params
        seen = [
            (
                p.shape,
                p.dtype,
                p.device,
                m.dtype,
                (notes := p.__dict__).get(_ROLE),
                notes.get(_SPLIT),
                notes.get(_TURNED),
            )
            for p, m in zip(everything, momenta)
        ]
        placed = _any_dtensor(params) and [(p.device_mesh, p.placements) if is_dtensor(p) else None for p in everything]
        signature = (said, seen, placed, id(iteration.composition), iteration[1:])
        known = self._plans.get(id(group))
        if known is None or known[0] != signature:
            known = signature, muon_plan(params, momenta, iteration, **said)
            self._plans[id(group)] = known
        if len(self._plans) > len(self.param_groups):
            here = {id(group) for group in self.param_groups}
            self._plans = {key: plan for key, plan in self._plans.items() if key in here}
        return known[1]

    def before_update(self, group: Mapping[str, Any], W: Tensor, update: Tensor, *slots: Tensor) -> None:
        """Do nothing; a variant of Muon may change the updates of some matrices here, in place, before they are taken.

        Args:
            group: the group of parameters, with its options.
            W: matrices ``(b, rows, columns)``, a view of a parameter.
            update: of the same shape, orthogonal, before the factor by shape and the learning rate.
            slots: views of what :meth:`slots` keeps for the parameter besides the momentum.
        """

    def after_update(self, group: Mapping[str, Any], W: Tensor, update: Tensor, *slots: Tensor) -> None:
        """Do nothing; a variant of Muon may change the weights of some matrices here, in place, when they have moved.

        The arguments are those of :meth:`before_update`.
        """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _decay(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Apply the decays that need the singular values of each matrix."""
        amount = float(group["lr"] * group["weight_decay"])
        for index, parameter in enumerate(params):
            name = f"parameter {index}"
            for part in parts(name, (parameter,) * 3, layout(name, parameter, group), None):
                if part.tensors[0].numel():
                    decay_(part.tensors[0], amount, group["decay"], group["decay_bound"])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Muon":
        memo[id(self.process_group)] = self.process_group  # the same processes
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon for the linear maps, AdamW for embeddings, head, gains and biases.

    With the scales ``moonlight`` and ``rms`` both take the same learning rate and decay (Liu et al.,
    arXiv:2502.16982), which None stands for.

    Attributes:
        lr: Muon's learning rate.
        momentum: decay of Muon's momentum.
        nesterov: look one step ahead.
        weight_decay: decay of both, decoupled in AdamW.
        decay: what Muon's decay shrinks, ``decoupled``, ``spectral`` or ``clipped``, see :class:`danlu.optim.Muon`.
        decay_bound: of ``clipped``, where decay begins.
        scale: factor by shape, see :func:`danlu.optim.shape_scale`.
        method: iteration, ``auto``, ``fast`` or a name of :func:`danlu.approx.published`.
        steps: number of polynomials; None for what ``method`` is made for.
        dtype: dtype of the iteration; ``auto`` takes the faster of float32 and bfloat16.
        momentum_dtype: dtype of Muon's momentum; ``auto`` is the parameter's own.
        adamw_lr: AdamW's learning rate; None for Muon's.
        embedding_lr: learning rate of the embeddings, whose entries of size one want larger steps than a matrix;
            None for adamw_lr.
        betas: AdamW's decays of the first and of the second moment.
        eps: added to the root of AdamW's second moment.
        no_decay: roles without decay.
        rounding: of bfloat16 weights: ``nearest``, ``stochastic`` or ``compensated``; wider ones are left as they are.
        rounding_seed: of ``stochastic``.
    """

    lr: float = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.1
    decay: Literal["decoupled", "spectral", "clipped"] = "decoupled"
    decay_bound: float | None = None
    scale: Literal["moonlight", "rms", "plain", "jordan", "mup"] = "moonlight"
    method: str = "auto"
    steps: int | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    momentum_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    adamw_lr: float | None = None
    embedding_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    no_decay: tuple[str, ...] = ("gain", "bias")
    rounding: Literal["nearest", "stochastic", "compensated"] = "nearest"
    rounding_seed: int = 0

    def __post_init__(self) -> None:
        Muon(probe(), **self.muon_options())
        if self.adamw_lr is not None:
            number("adamw_lr", self.adamw_lr, low=0)
        self._adamw()

    def muon_options(self) -> dict[str, Any]:
        """Return the arguments of :class:`Muon`."""
        return {
            "lr": self.lr,
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "weight_decay": self.weight_decay,
            "decay": self.decay,
            "decay_bound": self.decay_bound,
            "scale": self.scale,
            "method": self.method,
            "steps": self.steps,
            "dtype": dtype_of("dtype", self.dtype),
            "momentum_dtype": dtype_of("momentum_dtype", self.momentum_dtype),
            "rounding": self.rounding,
            "rounding_seed": self.rounding_seed,
        }

    def _adamw(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.lr if self.adamw_lr is None else self.adamw_lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            embedding_lr=self.embedding_lr,
            no_decay=self.no_decay,
            rounding=self.rounding,
            rounding_seed=self.rounding_seed,
        )

    def build(self, model: nn.Module, *, process_group: Any = None, **others: Any) -> Optimizer:
        """Return one optimizer of all parameters of ``model`` that require a gradient, grouped by role.

        Args:
            model: sorted by :func:`danlu.optim.param_groups`.
            process_group: processes that hold replicas of the model, among which Muon shares its work; None for none.
            others: nothing that it needs.

        Returns:
            A :class:`danlu.optim.CombinedOptimizer` of Muon and AdamW, or the one of them that the model needs.

        >>> model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 8), nn.LayerNorm(8))
        >>> optimizer = MuonConfig(lr=0.01).build(model)
        >>> [group["role"] for group in optimizer.param_groups]
        ['matrix', 'embedding', 'gain', 'bias']
        """
        groups = param_groups(model)
        maps = [group for group in groups if group["role"] in MATRIX_ROLES]
        rest = [group for group in groups if group["role"] not in MATRIX_ROLES]
        if not maps:
            return self._adamw().of_groups(rest)
        maps = by_role(maps, embedding_lr=None, no_decay=self.no_decay)
        muon = Muon(maps, process_group=process_group, **self.muon_options())
        if not rest:
            return muon
        others_roles = [role for role in ROLES if role not in MATRIX_ROLES]
        adamw = self._adamw().of_groups(rest)
        both = CombinedOptimizer([(muon, MATRIX_ROLES), (adamw, others_roles)], model=model)
        if self.rounding == "nearest":  # torch's, whose own hooks are not called
            watch_resolution(both, adamw.param_groups, "AdamW")
        return both
