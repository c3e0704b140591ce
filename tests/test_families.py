"""The families of causal models that transformers has: served exactly with retrieval running, or refused by name."""

import pytest

from benchmarks.families import Family, check, table

SERVED = {  # cache layers that retrieve, of six
    "bart": 6,
    "cohere2": 1,
    "jamba": 1,
    "olmo2": 6,
    "opt": 6,
    "phi3": 6,
    "qwen3_next": 1,
    "stablelm": 6,
}
REFUSED = {
    "falcon": "it does not use transformers' AttentionInterface",
    "git": "its GitSelfAttention does not use transformers' AttentionInterface",
    "glm_moe_dsa": "a learnt indexer of the model's own",
    "mamba": "linear attention, which keeps a state",
    "minimax": "it asks for a cache of its own, a MiniMaxCache",
}


@pytest.mark.parametrize("name", sorted(SERVED))
def test_a_family_is_exact_while_its_layers_retrieve(name):
    family = check(name)
    assert (family.outcome, family.exact) == ("retrieves", True), family.reason
    assert family.retrieving == SERVED[name]
    assert family.retrieving + family.dense == family.layers == 6


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_family_that_cannot_be_served_is_refused_with_the_reason(name):
    family = check(name)
    assert family.outcome == "refused", family.reason
    assert REFUSED[name] in family.reason


def test_the_table_counts_what_it_lists():
    families = [Family("a", "A", "retrieves", True, 2, 1, 3), Family("b", "B", "refused", reason="one | two")]
    text = table(families).splitlines()
    assert text[0].startswith("2 causal-LM types")
    assert "1 retrieves, 1 refused; not exact: none" in text[0]
    assert "| a | retrieves | yes | 2 of 3 | 1 |  |" in text
    assert all(line.count("|") == 7 for line in text[2:])
