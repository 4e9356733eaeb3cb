"""Layouts of templates, with prompt rows in several places and padding on both sides, through both backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_splice import check, draw, draw_ids, integers

import oracle
from fusedprompt import Layout, Template, ops
from tolerance import examples

parts = st.lists(st.sampled_from(("[prompt 1]", "[prompt 5]", "[prompt 16]", "[anchor 7 8]")), max_size=4)


@st.composite
def rendered(draw: st.DrawFn) -> tuple[Layout, int]:
    """A layout of a batch of texts in a template, and T."""
    around = draw(st.permutations([*draw(parts), "[a]", "[b]"]))
    template = Template.parse(" ".join(["[prompt 3]", *around, "[prompt 2]"]))
    size = draw(st.integers(1, 4))
    texts = st.lists(st.lists(st.just(1), max_size=6), min_size=size, max_size=size)
    batch = template.render({"a": draw(texts), "b": draw(texts)}, padding_side=draw(st.sampled_from(("left", "right"))))
    return Layout.from_slots(batch["slots"], template.num_prompt_rows), batch["input_ids"].shape[1]


@examples(8)
@given(
    case=rendered(),
    source=st.sampled_from(("table", "inputs_embeds")),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_template_splices_and_their_gradients_have_the_bits_of_the_oracle(
    case: tuple[Layout, int], source: str, dtype: torch.dtype
) -> None:
    layout, length = case
    assert layout.slots is not None
    shape = (layout.slots.shape[0], layout.num_prompt_rows, length, 17, 11)
    check(shape, layout, layout.slots.tolist(), source, dtype)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_prompt_used_by_many_rows_has_its_gradient_summed_alike_on_both_backends(backend: str) -> None:
    template = Template.parse("[prompt 7] [a] [prompt 19] [anchor 3] [prompt 7]")
    batch = template.render([[1] * (b % 5) for b in range(23)], padding_side="left")
    shape = (23, 33, batch["input_ids"].shape[1], 9, 11)
    prompt, table = draw(shape, "table", torch.float32, torch.float32)
    out = ops.splice(prompt, batch.layout, input_ids=draw_ids(shape), table=table, backend=backend)
    d_out = integers(*out.shape)
    first, second = (torch.autograd.grad(out, (prompt, table), d_out.float(), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    d_prompt, _ = oracle.splice_gradients(d_out, batch["slots"].tolist(), 33, shape[2])
    assert torch.equal(first[0].double(), d_prompt)
