"""Several update rules as one optimizer, so that whatever takes a ``torch.optim.Optimizer`` takes them."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from danlu._roles import ROLES, declared
from danlu._validate import choice
from danlu.optim._base import MomentumOptimizer
from danlu.optim._common import label
from danlu.optim.groups import check_partition

Rule = tuple[Optimizer, Sequence[str]]

_MERGE = (
    "the states of Muon and AdamW, stepped apart in release 0.1, are loaded as merged_state_dicts([muon's, adamw's])"
)


class CombinedOptimizer(Optimizer):
    """One optimizer whose groups are each updated by one of several rules.

    Its ``param_groups`` are the rules' own dictionaries, so that a scheduler that writes ``lr`` reaches them, its
    ``state`` is the state of all, and its ``state_dict`` has torch's format. Schedulers, hooks, closures,
    ``torch.amp.GradScaler`` and ``torch.distributed.checkpoint.state_dict`` see an ordinary optimizer. The rules belong
    to it from then on: step, save and load the whole, not a part. Groups that are taken out of ``param_groups``, and a
    ``state`` that is assigned, are followed at the next step.

    ``OneCycleLR`` and ``CyclicLR`` need ``cycle_momentum=False``, or raise torch's ValueError: they write either
    ``momentum`` or ``betas`` into all groups, of which each rule has its own.

    Args:
        rules: each an optimizer with its groups, and the roles (see :data:`danlu.optim.ROLES`) of the groups that
            :meth:`add_param_group` is to give it.
        model: if given, each of its parameters that requires a gradient has to be in a group.

    Raises:
        TypeError: a rule is no optimizer, or one that evaluates the loss itself (LBFGS).
        ValueError: a parameter is in two rules, or in none of them, and is named; a role has two rules.

    >>> hidden, head = nn.Linear(2, 4, bias=False), nn.Linear(4, 2, bias=False)
    >>> sgd, adamw = torch.optim.SGD(hidden.parameters(), lr=0.1), torch.optim.AdamW(head.parameters(), lr=0.01)
    >>> optimizer = CombinedOptimizer([(sgd, ("matrix",)), (adamw, ("head",))], model=nn.Sequential(hidden, head))
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.1, 0.01]
    """

    def __init__(self, rules: Iterable[Rule], *, model: nn.Module | None = None) -> None:
        rules = [(rule, tuple(roles)) for rule, roles in rules]
        if not rules:
            raise ValueError("rules must hold at least one optimizer")
        for rule, _ in rules:
            if not isinstance(rule, Optimizer):
                raise TypeError(f"rules must hold torch.optim.Optimizer objects, got {type(rule).__name__}")
            if isinstance(rule, torch.optim.LBFGS):
                raise TypeError("rules must step by the gradients alone, got LBFGS, which calls a closure many times")
        self.rules = tuple(rule for rule, _ in rules)
        self._by_role = _by_role(rules)
        groups = [group for rule in self.rules for group in rule.param_groups]
        names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
        _check_once(groups, names)
        if model is not None:
            check_partition(groups, model)
        first, *others = (rule.defaults for rule in self.rules)
        # What all the rules have: schedulers look for it here.
        super().__init__(groups, {key: first[key] for key in first if all(key in other for other in others)})
        held = [(parameter, state) for rule in self.rules for parameter, state in rule.state.items()]
        self._share(defaultdict(dict, held))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._linked = tuple(self.param_groups)

    def _share(self, state: "defaultdict[Any, Any]") -> None:
        """Let the rules keep what they know of each parameter in the one state of this optimizer."""
        self.state = state
        for rule in self.rules:
            rule.state = state
        self._linked = tuple(self.param_groups)

    def _follow(self) -> None:
        """Let the rules have what was assigned to ``param_groups`` and ``state`` of the whole.

        Raises:
            ValueError: a group is no rule's, or groups or state of a rule were replaced by themselves.
        """
        linked, here = [id(group) for group in self._linked], [id(group) for group in self.param_groups]
        held = {id(group): index for index, rule in enumerate(self.rules) for group in rule.param_groups}
        for position, group in enumerate(self.param_groups):
            if id(group) not in held:
                accepted = "accepted in param_groups are the groups that add_param_group and load_state_dict made"
                raise ValueError(f"{label(position, group, 0)} has no rule; {accepted}")
        if held.keys() - linked or any(rule.state is not self.rules[0].state for rule in self.rules):
            raise ValueError("a rule was given groups or a state by itself; add or load them by the combined optimizer")
        if here == linked and self.state is self.rules[0].state:
            return
        for index, rule in enumerate(self.rules):
            rule.param_groups = [group for group in self.param_groups if held[id(group)] == index]
        for group in self._linked:
            if id(group) not in here:
                for parameter in group["params"]:
                    self.state.pop(parameter, None)
        self._share(self.state)

    def _places(self) -> list[tuple[int, int]]:
        """Return for each group which rule holds it, and at which place among that rule's groups."""
        held = {
            id(group): (index, place)
            for index, rule in enumerate(self.rules)
            for place, group in enumerate(rule.param_groups)
        }
        return [held[id(group)] for group in self.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        self._follow()
        return {**super().__getstate__(), "rules": self.rules, "_by_role": self._by_role}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the rule for its role.

        Args:
            param_group: as for any optimizer, with ``role``, one of :data:`danlu.optim.ROLES`. It may be left out
                where a layer has declared the same role of all the parameters.

        Raises:
            ValueError: the role is unknown or missing, no rule takes it, or a parameter is in a group already.
        """
        if any(param_group is group for rule in self.rules for group in rule.param_groups):
            super().add_param_group(param_group)  # a rule's own, while this optimizer is made of them
            return
        self._follow()
        param_group = _unnamed(param_group)
        position = len(self.param_groups)
        _check_once([*self.param_groups, param_group], {})
        rule = self.rules[self._by_role[_role(position, param_group, self._by_role)]]
        rule.add_param_group(param_group)
        try:
            super().add_param_group(rule.param_groups[-1])
        except (TypeError, ValueError):
            rule.param_groups.pop()
            raise
        self._linked = tuple(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all the rules in torch's format, the parameters numbered in the order of the groups."""
        self._follow()
        return super().state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Restore state and options of all the rules, each in the dtypes that it keeps; on an error nothing changes.

        Raises:
            TypeError: it is no dictionary, as the list of two that earlier releases saved.
            ValueError: the state is of other groups, or of other rules.
        """
        if isinstance(state_dict, (list, tuple)):
            raise TypeError(f"state_dict must be a dictionary, got a {type(state_dict).__name__}; {_MERGE}")
        self._follow()
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        places = self._places()
        sizes = [len(group["params"]) for group in self.param_groups]
        saved = [len(group["params"]) for group in state_dict["param_groups"]]
        if sizes != saved:
            raise ValueError(f"state_dict has groups of {saved} parameters, expected {sizes}; {_MERGE}")
        before_loading = [(rule.state, rule.param_groups) for rule in self.rules]
        try:
            self._load_rules(state_dict, places)
        except BaseException:
            for rule, (state, groups) in zip(self.rules, before_loading):
                rule.state, rule.param_groups = state, groups
            raise
        # Loading gave each rule new dictionaries.
        self.param_groups = [self.rules[index].param_groups[place] for index, place in places]
        self._share(defaultdict(dict, [item for rule in self.rules for item in rule.state.items()]))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load_rules(self, state_dict: Mapping[str, Any], places: Sequence[tuple[int, int]]) -> None:
        for index, rule in enumerate(self.rules):
            groups = [group for group, (owner, _) in zip(state_dict["param_groups"], places) if owner == index]
            keys = {key for group in groups for key in group["params"]}
            state = {key: value for key, value in state_dict["state"].items() if key in keys}
            rule.load_state_dict({"state": state, "param_groups": groups})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with every rule; return the closure's loss if there is a closure, which is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():  # torch's fused kernels and hooks cannot be traced: one break for all of them
            self._step_untraced()
            for rule in self.rules:
                if isinstance(rule, MomentumOptimizer):
                    _unhooked_step(type(rule))(rule)
            return loss
        self._follow()
        for rule in self.rules:
            _unhooked_step(type(rule))(rule)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step_untraced(self) -> None:
        self._follow()
        for rule in self.rules:
            if not isinstance(rule, MomentumOptimizer):
                _unhooked_step(type(rule))(rule)


def _unhooked_step(kind: type[Optimizer]) -> Callable[[Optimizer], Any]:
    """Return the step of a class of optimizers without torch's hooks, which are called once for the whole."""
    step: Callable[[Optimizer], Any] = inspect.unwrap(kind.step, stop=lambda f: not hasattr(f, "hooked"))
    return step


def _by_role(rules: Sequence[Rule]) -> dict[str, int]:
    """Return which rule takes the groups of a role."""
    found: dict[str, int] = {}
    for index, (_, roles) in enumerate(rules):
        for role in roles:
            choice("role of a rule", role, ROLES)
            if role in found:
                raise ValueError(f"two rules take the role {role!r}; accepted is one")
            found[role] = index
    return found


def _role(position: int, group: Mapping[str, Any], by_role: Mapping[str, int]) -> str:
    """Return the role of a group that is added: its own, or the one that its parameters were declared to have."""
    role: str | None = group.get("role")
    if role is None:
        said = {declared(label(position, group, i), p)[0] for i, p in enumerate(group["params"])}
        role = said.pop() if len(said) == 1 else None
        if role is None:
            raise ValueError(f"{label(position, group, 0)} has no rule: give the group a role, one of {_list(by_role)}")
    choice(f"role of group {position}", role, ROLES)
    if role not in by_role:
        raise ValueError(f"{label(position, group, 0)} of role {role!r} has no rule; accepted are {_list(by_role)}")
    return role


def _list(by_role: Mapping[str, int]) -> str:
    return ", ".join(by_role)


def _unnamed(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with its parameters in a list, and their names apart if they came as (name, parameter)."""
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    if not all(isinstance(p, tuple) for p in params):
        return {**group, "params": params}
    return {**group, "params": [p for _, p in params], "param_names": [name for name, _ in params]}


def _check_once(groups: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> None:
    """Raise unless every parameter is in one group only."""
    seen: dict[int, int] = {}
    for position, group in enumerate(groups):
        for index, parameter in enumerate(group["params"]):
            if seen.setdefault(id(parameter), position) != position:
                name = names.get(id(parameter))
                called = label(position, group, index) if name is None else f"parameter {name} of group {position}"
                raise ValueError(f"{called} is in group {seen[id(parameter)]} already; accepted is one rule for each")


def merged_state_dicts(state_dicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state of several optimizers as that of one whose groups are theirs, in their order.

    What was saved when Muon and AdamW were stepped apart is loaded by :class:`CombinedOptimizer` in this form.

    Args:
        state_dicts: what the optimizers' ``state_dict`` returned.

    >>> parts = [torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr).state_dict() for lr in (0.1, 0.2)]
    >>> [(group["lr"], group["params"]) for group in merged_state_dicts(parts)["param_groups"]]
    [(0.1, [0]), (0.2, [1])]
    """
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    for part in state_dicts:
        offset = sum(len(group["params"]) for group in groups)
        state.update({key + offset: value for key, value in part["state"].items()})
        groups += [{**group, "params": [key + offset for key in group["params"]]} for group in part["param_groups"]]
    return {"state": state, "param_groups": groups}
