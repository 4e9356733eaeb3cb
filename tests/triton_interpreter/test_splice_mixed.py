"""Layouts of mixed batches, whose slots refer to a table of several prompts and a row of padding, through Triton."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_splice import check

from fusedprompt.base.facts import BaseFacts
from fusedprompt.base.tasks import task_of
from fusedprompt.layouts.mixture import BASE, Mixture, arrange
from fusedprompt.layouts.prompt import Prompt
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
