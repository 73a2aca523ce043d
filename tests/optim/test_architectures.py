"""Roles and splits of public architectures, each a tiny model without weights made from its own configuration."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from danlu.optim import describe, param_groups

transformers = pytest.importorskip("transformers")

TABLE = Path(__file__).with_name("architectures.txt")
PLAIN = {
    **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 40},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
EXPERTS = {
    **PLAIN,
    **{"num_experts": 3, "num_local_experts": 3, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "moe_intermediate_size": 24,
}


def read_table():
    """Return {class: (configuration, {role: leaves})}."""
    bases = {"plain": PLAIN, "experts": EXPERTS, "none": {}}
    table = {}
    lines = [line for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]
    for block in re.split(r"\n(?! )", "\n".join(lines)):
        head, _, roles = block.partition("\n")
        name, base, options = head.split(" ", 2)
        expected = {role: set(leaves) for role, *leaves in map(str.split, roles.split("|"))}
        table[name] = ({**bases[base], **json.loads(options)}, expected)
    return table


KNOWN = read_table()


def written(model):
    """Return the roles of a model as the table has them."""
    found = {}
    for group in param_groups(model):
        split = "+".join(map(str, group["split"])) if isinstance(group["split"], tuple) else group["split"]
        role = f"{group['role']}{f'/{split}' if split else ''}{'^' * group['transposed']}{'?' * bool(group['note'])}"
        for name in group["param_names"]:
            parts = [part for part in name.split(".") if part != "weight"]
            leaf = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
            plain = (role == "bias" and leaf.endswith("bias")) or (role == "gain" and "norm" in name.lower())
            if not plain:
                found.setdefault(role, {})[leaf] = None
    return {role: set(leaves) for role, leaves in found.items()}


def built(name, options):
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this release of transformers has no {name}")
    config = kind.config_class(**options)
    with torch.device("meta"):
        return kind(config)


@pytest.mark.parametrize("name", KNOWN)
def test_every_parameter_of_a_public_architecture_has_its_role(name):
    options, expected = KNOWN[name]
    assert written(built(name, options)) == expected


def test_there_are_forty_of_them_and_the_page_lists_these():
    page = (Path(__file__).parents[2] / "docs" / "optim" / "groups.md").read_text()
    listed = page.partition("## Architectures")[2].partition("Of diffusers")[0]
    assert len(KNOWN) >= 40
    assert set(re.findall(r"`(\w+)`", listed)) == set(KNOWN)


class Sizes:
    """A configuration that has every size: 10 features, 3 experts, 12 hidden units."""

    def __getattr__(self, name):
        if "act" in name:
            return "silu"
        if "hidden" in name or ("dim" in name and "inter" not in name):
            return 10
        return 3 if "expert" in name and "inter" not in name else 12


def test_every_stack_of_experts_in_transformers_is_split_and_oriented_as_its_class_computes():
    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = path.read_text()
        classes = re.findall(r"^class (\w+)\(nn\.Module\)(.*?)(?=^class |\Z)", text, re.S | re.M)
        for name, body in classes:
            if not re.search(r"self\.gate_up_proj\s*=\s*nn\.Parameter", body):
                continue
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            with torch.device("meta"):
                layer = getattr(module, name)(Sizes())
            groups = {name: group for group in param_groups(layer) for name in group["param_names"]}
            up, down = groups["gate_up_proj"], groups["down_proj"]
            assert up["role"] == down["role"] == "experts"
            assert up["transposed"] == down["transposed"]
            # Read from the class: what it multiplies by, and how it takes gates and values apart.
            turned = bool(re.search(r"torch\.bmm\(\w+, self\.gate_up_proj\)|@ self\.gate_up_proj\[", body))
            assert up["transposed"] == turned, name
            assert up["split"] == (None if "gate_up[..., ::2]" in body else 2), name
            found[name] = up
    assert len(found) >= 60


def test_the_table_says_what_is_not_certain():
    text = describe(param_groups(built("GPTNeoXForCausalLM", PLAIN)))
    assert re.search(r"query_key_value\.weight: its parts take turns, .*\s+not split", text, re.S)
    text = describe(param_groups(built("Llama4ForCausalLM", KNOWN["Llama4ForCausalLM"][0])))
    assert "3 x 32 x 96 in > out" in text
