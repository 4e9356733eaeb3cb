"""The LSTM encoder in plain PyTorch, with backpropagation through time written out.

Per layer and direction d, with steps t = 0 ... P-1 (the backward direction sees the sequence flipped):

    a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh        i, f, o = sigmoid(a^i), sigmoid(a^f), sigmoid(a^o); g = tanh(a^g)
    c_t = f c_{t-1} + i g                              h_t = o tanh(c_t)

Only W_hh h is sequential. The input products of all steps are one GEMM before the loop; the gradients of both weights
are one GEMM each after it.

Where PyTorch's own LSTM is right and faster (stock.py) it runs instead. Where only the forward is PyTorch's, no more
than the layers' outputs is kept: once every h is known W_hh h is no longer sequential, so backward computes the gates
again with two GEMMs, and only c is left to do step by step.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .._library import Tensors, below_autograd, define, is_traced
from . import stock
from .stock import by_layer

# What the loop keeps per layer for backward; the op returns them flat, in this order. PyTorch's forward keeps the
# output of each layer but the last.
SAVED = ("hidden", "gates", "cell", "cell_tanh")


def _state_dtype(x: Tensor) -> torch.dtype:
    """Gates and cells are kept in fp32, or in fp64 for fp64 weights."""
    return torch.promote_types(x.dtype, torch.float32)


# Where W_hh of both directions together has more bytes than this, one direction takes all its steps before the other:
# going back and forth between two matrices that do not fit the cache reads both from memory at every step.
_TOGETHER_BYTES = 12 << 20


def _turns(layer: list[Tensors]) -> list[slice]:
    """The directions that take their steps together; each slice is a turn."""
    weight_hh = layer[0][1]
    if len(layer) * weight_hh.numel() * weight_hh.element_size() <= _TOGETHER_BYTES:
        return [slice(0, len(layer))]
    return [slice(way, way + 1) for way in range(len(layer))]


def _both_ways(x: Tensor, directions: int) -> Tensor:
    """(P, B, D) as (directions, P, B, D), each direction in its own order of time."""
    return torch.stack((x, x.flip(0))[:directions])


def _join_ways(y: Tensor) -> Tensor:
    """(directions, P, B, H), each in its own order of time, as (P, B, directions * H) in the order of the sequence."""
    return torch.cat((y[0], *(way.flip(0) for way in y[1:])), dim=-1)


def _split_ways(output: Tensor, directions: int) -> Tensor:
    """(P, B, directions * H) as (directions, P + 1, B, H): each in its own order of time, after an h of zero."""
    steps, batch, size = output.shape
    hidden = output.new_zeros(directions, steps + 1, batch, size // directions)
    for way, value in enumerate(output.chunk(directions, dim=-1)):
        hidden[way, 1:] = value.flip(0) if way else value
    return hidden


def _gates_again(inputs: Tensor, hidden: Tensor, layer: list[Tensors]) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, cell and tanh of the cell, from inputs and hidden states."""
    directions, steps, batch, width = inputs.shape
    size = hidden.shape[-1]
    state = _state_dtype(inputs)
    gates = inputs.new_empty(directions, steps * batch, 4 * size, dtype=state)
    for way, (weight_ih, weight_hh, bias_ih, bias_hh) in enumerate(layer):
        rows, recurrent = inputs[way].reshape(steps * batch, width), hidden[way, :-1].reshape(steps * batch, size)
        if inputs.dtype == state:
            torch.addmm(bias_ih + bias_hh, rows, weight_ih.t(), out=gates[way])
            gates[way].addmm_(recurrent, weight_hh.t())
        else:  # each product is rounded
            torch.add(torch.addmm(bias_ih + bias_hh, rows, weight_ih.t()), recurrent @ weight_hh.t(), out=gates[way])
    gates = gates.view(directions, steps, batch, 4 * size)
    gate = gates.view(directions, steps, batch, 4, size)
    gate[..., :2, :].sigmoid_()
    gate[..., 2, :].tanh_()
    gate[..., 3, :].sigmoid_()
    cell = inputs.new_zeros(directions, steps + 1, batch, size, dtype=state)
    torch.mul(gate[..., 0, :], gate[..., 2, :], out=cell[:, 1:])
    step_c, step_f = cell.unbind(1), gate[..., 1, :].unbind(1)
    for t in range(steps):
        step_c[t + 1].addcmul_(step_f[t], step_c[t])
    return gates, cell, cell[:, 1:].tanh()


def _layer_forward(inputs: Tensor, layer: list[Tensors]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    directions, steps, batch, width = inputs.shape
    size = layer[0][1].shape[1]
    state = _state_dtype(inputs)
    gates = inputs.new_empty(directions, steps, batch, 4 * size, dtype=state)
    hidden = inputs.new_zeros(directions, steps + 1, batch, size)
    cell = inputs.new_zeros(directions, steps + 1, batch, size, dtype=state)
    cell_tanh = torch.empty_like(cell[:, 1:], memory_format=torch.contiguous_format)
    for way, (weight_ih, _, bias_ih, bias_hh) in enumerate(layer):
        product = torch.addmm(bias_ih + bias_hh, inputs[way].reshape(steps * batch, width), weight_ih.t())
        gates[way] = product.view(steps, batch, 4 * size)

    for turn in _turns(layer):
        _steps_forward(layer[turn], gates[turn], hidden[turn], cell[turn], cell_tanh[turn])
    return gates, hidden, cell, cell_tanh


def _steps_forward(layer: list[Tensors], gates: Tensor, hidden: Tensor, cell: Tensor, cell_tanh: Tensor) -> None:
    """All steps of some directions: fills in `hidden`, `cell` and `cell_tanh`, and applies the gates' functions."""
    directions, steps, batch, size = cell_tanh.shape
    recurrent = [weights[1].t() for weights in layer]
    # Views are taken once: slicing inside the loop would cost more than the arithmetic at small sizes.
    gate = gates.view(directions, steps, batch, 4, size)
    step_i_f, step_o = gate[..., :2, :].unbind(1), gate[..., 3, :].unbind(1)
    step_i, step_f, step_g = (gate[..., index, :].unbind(1) for index in range(3))
    step_c, step_tanh, step_h = cell.unbind(1), cell_tanh.unbind(1), hidden.unbind(1)
    way_gates, way_hidden = [way.unbind(0) for way in gates], [way.unbind(0) for way in hidden]
    exact = hidden.dtype == gates.dtype
    for t in range(steps):
        if t:
            for way in range(directions):
                if exact:
                    way_gates[way][t].addmm_(way_hidden[way][t], recurrent[way])
                else:
                    way_gates[way][t].add_(way_hidden[way][t] @ recurrent[way])
        step_i_f[t].sigmoid_()
        step_g[t].tanh_()
        step_o[t].sigmoid_()
        torch.mul(step_f[t], step_c[t], out=step_c[t + 1]).addcmul_(step_i[t], step_g[t])
        torch.tanh(step_c[t + 1], out=step_tanh[t])
        torch.mul(step_o[t], step_tanh[t], out=step_h[t + 1])


def _lstm_forward(
    x: Tensor, weights: Tensors, dropout_masks: Tensors, bidirectional: bool, *, keep: bool = True
) -> tuple[Tensor, list[Tensor]]:
    directions = 2 if bidirectional else 1
    layers = by_layer(weights, directions)
    sequence = x.transpose(0, 1)
    saved: list[Tensor] = []
    for index, layer in enumerate(layers):
        if stock.has_forward(x):
            sequence = stock.layer(sequence, layer)
            saved += (sequence,) if keep and index + 1 < len(layers) else ()
        else:
            gates, hidden, cell, cell_tanh = _layer_forward(_both_ways(sequence, directions), layer)
            saved += (hidden, gates, cell, cell_tanh)
            sequence = _join_ways(hidden[:, 1:])
        if dropout_masks and index + 1 < len(layers):
            sequence = sequence * dropout_masks[index]
    return sequence.transpose(0, 1).contiguous(), saved


def _lstm_forward_fake(
    x: Tensor, weights: Tensors, dropout_masks: Tensors, bidirectional: bool
) -> tuple[Tensor, list[Tensor]]:
    directions = 2 if bidirectional else 1
    batch, steps, _ = x.shape
    size, state = weights[1].shape[1], _state_dtype(x)
    saved: list[Tensor] = []
    layers = len(weights) // (4 * directions)
    if stock.has_forward(x):
        saved = [x.new_empty(steps, batch, directions * size) for _ in range(layers - 1)]
    else:
        for _ in range(layers):
            saved += (
                x.new_empty(directions, steps + 1, batch, size),
                x.new_empty(directions, steps, batch, 4 * size, dtype=state),
                x.new_empty(directions, steps + 1, batch, size, dtype=state),
                x.new_empty(directions, steps, batch, size, dtype=state),
            )
    return x.new_empty(batch, steps, directions * size), saved


def _steps_backward(
    layer: list[Tensors], d_output: Tensor, d_cell_d_hidden: Tensor, f: Tensor, factor: Tensor, d_gates: Tensor
) -> None:
    """All steps of some directions, from the last to the first: fills in `d_gates`, and adds to `d_output`."""
    directions, steps, batch, size = d_output.shape
    dtype = layer[0][1].dtype
    d_cell = d_output.new_zeros(directions, batch, size)
    d_cell_3 = d_cell.unsqueeze(2)
    step_d_hidden, step_dc_dh, step_f = d_output.unbind(1), d_cell_d_hidden.unbind(1), f.unbind(1)
    step_factor_3, step_factor_o = factor[..., :3, :].unbind(1), factor[..., 3, :].unbind(1)
    step_d_3, step_d_o = d_gates[..., :3, :].unbind(1), d_gates[..., 3, :].unbind(1)
    way_d_hidden = [way.unbind(0) for way in d_output]
    # A row times a matrix runs on one thread in MKL, a batch of two such products on two: half of the gates each, 1.9x
    # as fast. Below fp32 the row goes to oneDNN, which has threads, and halves would each be rounded.
    exact = dtype == d_gates.dtype
    way_d_gates = [way.view(steps, batch, 4 * size).unbind(0) for way in d_gates]
    way_halves = [way.view(steps, batch, 2, 2 * size).transpose(1, 2).unbind(0) for way in d_gates]
    halves = [weights[1].view(2, 2 * size, size) for weights in layer]
    for t in range(steps - 1, -1, -1):
        d_cell.addcmul_(step_d_hidden[t], step_dc_dh[t])
        torch.mul(d_cell_3, step_factor_3[t], out=step_d_3[t])
        torch.mul(step_d_hidden[t], step_factor_o[t], out=step_d_o[t])
        d_cell.mul_(step_f[t])
        if t:
            for way, weights in enumerate(layer):
                if exact:
                    d_hidden = torch.bmm(way_halves[way][t], halves[way]).sum(0)
                else:
                    # Not addmm_: on one thread, into this view, it has ten times the error.
                    d_hidden = way_d_gates[way][t].to(dtype) @ weights[1]
                way_d_hidden[way][t - 1].add_(d_hidden)


def _layer_backward(d_output: Tensor, inputs: Tensor, layer: list[Tensors], saved: dict[str, Tensor]) -> list[Tensor]:
    """d_output: (directions, P, B, H) and inputs: (directions, P, B, D), each direction in its own order of time;
    d_output is used up.

    Returns d_inputs (P, B, D), then per direction the gradients of weight_ih, weight_hh, bias_ih and bias_hh.
    """
    hidden, cell, cell_tanh = (saved[name] for name in ("hidden", "cell", "cell_tanh"))
    directions, steps, batch, size = cell_tanh.shape
    i, f, g, o = saved["gates"].view(directions, steps, batch, 4, size).unbind(3)
    # The local derivatives of all steps at once: d_a = factor * d_c for i, f, g and factor * d_h for o.
    factor = torch.empty_like(saved["gates"]).view(directions, steps, batch, 4, size)
    torch.mul(i * g, 1 - i, out=factor[..., 0, :])
    torch.mul(cell[:, :-1] * f, 1 - f, out=factor[..., 1, :])
    torch.mul(i, 1 - g * g, out=factor[..., 2, :])
    torch.mul(cell_tanh * o, 1 - o, out=factor[..., 3, :])
    d_cell_d_hidden = o * (1 - cell_tanh * cell_tanh)

    d_gates = torch.empty_like(factor)
    for turn in _turns(layer):
        _steps_backward(layer[turn], d_output[turn], d_cell_d_hidden[turn], f[turn], factor[turn], d_gates[turn])

    rows = steps * batch
    d_inputs = None
    gradients: list[Tensor] = []
    for way, (weight_ih, _, bias_ih, bias_hh) in enumerate(layer):
        d_gate = d_gates[way].view(rows, 4 * size)
        d_bias = d_gate.sum(0)
        d_gate = d_gate.to(hidden.dtype)
        gradients += (
            d_gate.t() @ inputs[way].reshape(rows, weight_ih.shape[1]),
            d_gate.t() @ hidden[way, :-1].reshape(rows, size),
            d_bias.to(bias_ih.dtype),
            d_bias.to(bias_hh.dtype, copy=True),
        )
        d_input = (d_gate @ weight_ih).view(steps, batch, weight_ih.shape[1])
        d_inputs = d_input if d_inputs is None else d_inputs + d_input.flip(0)
    assert d_inputs is not None
    return [d_inputs, *gradients]


def _lstm_backward(
    d_output: Tensor, x: Tensor, weights: Tensors, masks: Tensors, bidirectional: bool, output: Tensor, saved: Tensors
) -> list[Tensor]:
    """Gradients of x and of every weight, in the order of nn.LSTM's parameters."""
    directions = 2 if bidirectional else 1
    layers = by_layer(weights, directions)
    if stock.has_forward(x):
        kept = [{"hidden": _split_ways(value, directions)} for value in (*saved, output.transpose(0, 1))]
    else:
        kept = [dict(zip(SAVED, saved[start : start + len(SAVED)])) for start in range(0, len(saved), len(SAVED))]
    d_sequence = d_output.transpose(0, 1)
    gradients: list[Tensor] = []
    for index in range(len(layers) - 1, -1, -1):
        if masks and index + 1 < len(layers):
            d_sequence = d_sequence * masks[index]
        ways = d_sequence.to(_state_dtype(d_sequence)).chunk(directions, dim=-1)
        d_hidden = torch.stack((ways[0], *(way.flip(0) for way in ways[1:])))
        sequence = _join_ways(kept[index - 1]["hidden"][:, 1:]) if index else x.transpose(0, 1)
        if masks and index:
            sequence = sequence * masks[index - 1]
        inputs = _both_ways(sequence, directions)
        if stock.has_forward(x):
            kept[index].update(zip(SAVED[1:], _gates_again(inputs, kept[index]["hidden"], layers[index])))
        d_sequence, *of_layer = _layer_backward(d_hidden, inputs, layers[index], kept.pop())
        gradients = of_layer + gradients
    return [d_sequence.transpose(0, 1).contiguous(), *gradients]


def _lstm_backward_fake(d_output: Tensor, x: Tensor, weights: Tensors, *_: Any) -> list[Tensor]:
    return [value.new_empty(value.shape) for value in (x, *weights)]


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bidirectional: bool, num_weights: int, *tensors: Tensor) -> Tensor:
        arguments = (x, list(tensors[:num_weights]), list(tensors[num_weights:]), bidirectional)
        if is_traced(x):
            output, saved = below_autograd("lstm_forward", *arguments)
        else:  # 0.2 ms less
            with torch._C._AutoDispatchBelowAutograd():
                output, saved = _lstm_forward(*arguments)
        ctx.bidirectional, ctx.num_weights, ctx.num_tensors = bidirectional, num_weights, len(tensors)
        ctx.save_for_backward(x, output, *tensors, *saved)
        return cast(Tensor, output)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        stock.refuse_double_backward(d_output)
        x, output, *rest = ctx.saved_tensors
        tensors, saved = rest[: ctx.num_tensors], rest[ctx.num_tensors :]
        weights, masks = tensors[: ctx.num_weights], tensors[ctx.num_weights :]
        d_x, *d_weights = torch.ops.fusedprompt.lstm_backward(
            d_output, x, weights, masks, ctx.bidirectional, output, saved
        )
        return (d_x, None, None, *d_weights, *(None for _ in masks))


def _lstm_autograd(x: Tensor, weights: Tensors, dropout_masks: Tensors, bidirectional: bool) -> Tensor:
    if not torch.is_grad_enabled():
        return cast(Tensor, below_autograd("lstm", x, weights, dropout_masks, bidirectional))
    apply: Any = _LSTM.apply
    return cast(Tensor, apply(x, bidirectional, len(weights), *weights, *dropout_masks))


_ARGUMENTS = "Tensor x, Tensor[] weights, Tensor[] dropout_masks, bool bidirectional"
define(f"lstm_forward({_ARGUMENTS}) -> (Tensor, Tensor[])", _lstm_forward, _lstm_forward_fake)
_BACKWARD_SCHEMA = f"lstm_backward(Tensor d_output, {_ARGUMENTS}, Tensor output, Tensor[] saved) -> Tensor[]"
define(_BACKWARD_SCHEMA, _lstm_backward, _lstm_backward_fake)
define(
    f"lstm({_ARGUMENTS}) -> Tensor",
    lambda *args: _lstm_forward(*args, keep=False)[0],
    lambda *args: _lstm_forward_fake(*args)[0],
    _lstm_autograd,
)


def lstm(x: Tensor, weights: Tensors, dropout_masks: Tensors, bidirectional: bool) -> Tensor:
    """dropout_masks: nothing, or per layer but the last a (P, B, directions * H) tensor of 0 and 1 / (1 - p)."""
    if stock.has_forward(x) and not is_traced(x) and x.numel() * weights[1].numel() > 0:
        if not torch.is_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
                return stock.lstm(x, weights, dropout_masks, bidirectional)
        if stock.has_backward(x, weights):
            return stock.lstm(x, weights, dropout_masks, bidirectional)
        return _lstm_autograd(x, weights, dropout_masks, bidirectional)
    if x.is_cuda and not dropout_masks and not torch.compiler.is_compiling():
        return stock.lstm(x, weights, dropout_masks, bidirectional)
    return cast(Tensor, torch.ops.fusedprompt.lstm(x, weights, dropout_masks, bidirectional))
