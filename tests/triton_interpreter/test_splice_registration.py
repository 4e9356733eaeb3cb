"""The splice's Triton ops as torch sees them: schemas, fakes, gradients, and tracing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_splice import Shape, arrange, draw, draw_ids

import fusedprompt
from fusedprompt.ops.splice import triton as kernels
from tolerance import generator, normal


def samples() -> list[tuple[str, tuple[Any, ...]]]:
    shape: Shape = (2, 3, 4, 8, 6)
    found: list[tuple[str, tuple[Any, ...]]] = []
    for arrangement in ("prefix", "any"):
        slots = arrange(arrangement, shape)[0].slots
        for dtype in (torch.float32, torch.bfloat16):
            prompt, table = draw(shape, "table", dtype, torch.float32)
            _, embeds = draw(shape, "inputs_embeds", dtype, torch.float32)
            ids = draw_ids(shape)
            found.append(("splice_triton", (prompt, slots, ids, table, None, [ids, ids], [1, kernels.POSITIONS])))
            found.append(("splice_triton", (prompt, slots, ids.int(), table.detach(), None, [], [])))
            found.append(("splice_triton", (prompt, slots, None, None, embeds, [ids], [-100])))
            d_out = normal((2, 7 if slots is None else slots.shape[1], 8), dtype, generator(3))
            for wanted in ((True, True), (True, False), (False, True))[: 3 if dtype == torch.float32 else 1]:
                found.append(("splice_backward_triton", (d_out, slots, 3, 4, *wanted)))
    found.append(("splice_table_backward_triton", (normal((2, 4, 8), torch.float32, generator(3)), ids, 6)))
    return found


@pytest.mark.parametrize(("name", "arguments"), samples())
def test_op_passes_opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.fusedprompt, name).default, arguments)


COMPILED = """
import sys
import torch
import fusedprompt as fp

where = torch.tensor([[0, -1, -3, 1, 2, 3, -1], [-3, 3, 3, 2, -1, 0, -3]])

def run(prompt, table, ids, slots, backend="triton"):
    layout = fp.Layout(3, slots)
    batch = fp.ops.splice_batch(
        prompt, layout, input_ids=ids, table=table, labels=ids, position_ids=ids, first_position=2, backend=backend
    )
    return 2 * batch.inputs_embeds * (batch.labels + batch.position_ids).unsqueeze(-1)

assert "triton" not in sys.modules
prompt, table = torch.randn(3, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
ids = torch.tensor([[1, 2, 0, 5, 5], [5, 5, 4, 3, 1]])
for slots, ids in ((None, ids), (None, ids[:, :4]), (where, ids)):
    results = []
    for function, backend in ((compiled, "triton"), (run, "triton"), (run, "reference")):
        out = function(prompt, table, ids, slots, backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (prompt, table))))
    for actual, eager, reference in zip(*results):
        assert torch.equal(actual, eager)
        torch.testing.assert_close(actual, reference)
"""


def test_a_process_that_compiles_before_its_first_splice_gets_the_bits_of_eager() -> None:
    """The op is registered while it is traced."""
    root = Path(fusedprompt.__file__).resolve().parent.parent
    process = subprocess.run([sys.executable, "-c", COMPILED], cwd=root, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
