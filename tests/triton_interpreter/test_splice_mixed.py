"""Layouts of mixed batches, whose slots refer to a table of several prompts and a row of padding, through Triton."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_splice import check

from fusedprompt import Layout, ops
from fusedprompt.base.facts import BaseFacts
from fusedprompt.base.tasks import task_of
from fusedprompt.layouts.mixture import BASE, Mixture, arrange
from fusedprompt.layouts.prompt import Prompt
from fusedprompt.ops import _triton
from tolerance import examples

COUNTS = {"a": 1, "b": 7, "c": 16}
PROMPTS = {
    name: Prompt(name, "PROMPT_TUNING", task_of("CAUSAL_LM"), rows, start=int(name == "b"))
    for name, rows in COUNTS.items()
}


@examples(5)
@given(
    rows=st.lists(st.tuples(st.sampled_from([BASE, *COUNTS]), st.integers(0, 3)), min_size=1, max_size=5),
    causal=st.booleans(),
    source=st.sampled_from(("table", "inputs_embeds")),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_mixed_splices_and_their_gradients_have_the_bits_of_the_oracle(
    rows: list[tuple[str, int]], causal: bool, source: str, dtype: torch.dtype
) -> None:
    names, padding = (list(values) for values in zip(*rows))
    mask = (torch.arange(5) >= torch.tensor(padding).unsqueeze(1)).long()
    facts = BaseFacts(False, causal, True, False, 0, None)
    layout = arrange(Mixture.of(PROMPTS, PROMPTS["a"], names, mask), facts, mask, mask).layout
    assert layout.slots is not None
    check((len(names), layout.num_prompt_rows, 5, 17, 11), layout, layout.slots.tolist(), source, dtype)


@pytest.mark.parametrize("source", ["table", "inputs_embeds"])
def test_each_rows_own_prefix_is_spliced_in_one_launch_with_the_bits_of_the_oracle(source: str) -> None:
    which = [2, 0, 2, 3]
    layout = Layout.prefixes(3, torch.tensor(which), 4)
    slots = [[-3 * one - row - 1 for row in range(3)] + [*range(5)] for one in which]
    with _triton.recorded_launches() as launches:
        check((4, 12, 5, 33, 11), layout, slots, source)
    assert launches.count("splice_forward") == 1


def test_fields_of_rows_with_their_own_prefix_are_those_of_the_reference() -> None:
    layout, ids = Layout.prefixes(2, torch.tensor([1, 0]), 2), torch.tensor([[3, 1, 4], [1, 5, 9]])
    table, prompt = torch.randn(10, 16), torch.randn(4, 16)
    fields = {"attention_mask": ids, "labels": ids, "position_ids": ids, "first_position": 2}
    found, expected = (
        ops.splice_batch(prompt, layout, input_ids=ids, table=table, **fields, backend=backend)
        for backend in ("triton", "reference")
    )
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(found, name), value), name
