"""The truth: every op written from its formula in fp64, one step at a time, sharing no code with the package.

Tensors come in already rounded to the dtype under test; everything here is computed from those values in fp64.
Gradients are autograd's through these functions, or the loops of `splice_gradients` and `cpt_gradient`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Slots = list[list[int]]


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    masks: Sequence[Tensor] = (),
    activation: str = "relu",
) -> Tensor:
    """y = W_n(... m_0 * f(W_0 x + b_0) ...) + b_n, with dropout masks m of 0 and 1 / (1 - p).

    f(a) = max(0, a), or tanh: (e^a - e^-a) / (e^a + e^-a)."""
    rows = []
    for row in x.double().unbind(0):
        for layer in range(len(weights)):
            row = (weights[layer].double() * row).sum(1) + biases[layer].double()
            if layer < len(weights) - 1:
                if activation == "tanh":
                    row = (torch.exp(row) - torch.exp(-row)) / (torch.exp(row) + torch.exp(-row))
                else:
                    row = torch.where(row > 0, row, 0.0)
                if masks:
                    row = row * masks[layer][len(rows)].double()
        rows.append(row)
    return torch.stack(rows)


def lstm(x: Tensor, weights: Sequence[Tensor], bidirectional: bool, masks: Sequence[Tensor] = ()) -> Tensor:
    """nn.LSTM's equations, batch first, zero initial state; weights in nn.LSTM's order; masks (P, B, directions * H).

    i = s(a_i), f = s(a_f), g = tanh(a_g), o = s(a_o);  c' = f c + i g;  h' = o tanh(c')
    """
    directions = 2 if bidirectional else 1
    queue = [weight.double() for weight in weights]
    sequence = list(x.double().unbind(1))  # P tensors (B, D)
    num_layers = len(weights) // (4 * directions)
    for layer in range(num_layers):
        outputs: list[list[Tensor]] = [[] for _ in sequence]
        for direction in range(directions):
            weight_ih, weight_hh, bias_ih, bias_hh = queue[:4]
            queue = queue[4:]
            size = weight_hh.shape[1]
            h = c = torch.zeros(x.shape[0], size, dtype=torch.float64)
            order = range(len(sequence)) if direction == 0 else range(len(sequence) - 1, -1, -1)
            for t in order:
                a = sequence[t] @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh
                i = 1 / (1 + torch.exp(-a[:, :size]))
                f = 1 / (1 + torch.exp(-a[:, size : 2 * size]))
                g = torch.tanh(a[:, 2 * size : 3 * size])
                o = 1 / (1 + torch.exp(-a[:, 3 * size :]))
                c = f * c + i * g
                h = o * torch.tanh(c)
                outputs[t].append(h)
        sequence = [torch.cat(parts, dim=1) for parts in outputs]
        if masks and layer < num_layers - 1:
            sequence = [step * masks[layer][t].double() for t, step in enumerate(sequence)]
    return torch.stack(sequence, dim=1)


def prefix_slots(batch: int, num_prompt_rows: int, length: int) -> Slots:
    """P prompt rows, then the tokens. A slot below 0 is prompt row -slot - 1, any other is a token."""
    return [[-r - 1 for r in range(num_prompt_rows)] + list(range(length)) for _ in range(batch)]


def insert_slots(num_prompt_rows: int, length: int, starts: Sequence[int], shifts: Sequence[int]) -> Slots:
    """The tokens of each row rotated left by its shift, with the prompt put in before position `start`."""
    slots = []
    for start, shift in zip(starts, shifts):
        tokens = [(position + shift) % length for position in range(length)]
        slots.append(tokens[:start] + [-r - 1 for r in range(num_prompt_rows)] + tokens[start:])
    return slots


def splice(prompt: Tensor, slots: Slots, token_rows: Tensor) -> Tensor:
    """out[b, s] = prompt row or token row, (B, S, D) in fp64; token_rows is (B, T, D)."""
    width = len(slots[0]) if slots else 0
    out = torch.full((len(slots), width, prompt.shape[1]), math.nan, dtype=torch.float64)
    for b, row in enumerate(slots):
        for s, slot in enumerate(row):
            out[b, s] = prompt[-slot - 1] if slot < 0 else token_rows[b, slot]
    return out


def splice_gradients(d_out: Tensor, slots: Slots, num_prompt_rows: int, length: int) -> tuple[Tensor, Tensor]:
    """d_prompt (R, D) and d_tokens (B, T, D) in fp64: each row collects the gradients of its uses."""
    width = d_out.shape[2]
    d_prompt = torch.zeros(num_prompt_rows, width, dtype=torch.float64)
    d_tokens = torch.zeros(len(slots), length, width, dtype=torch.float64)
    for b, row in enumerate(slots):
        for s, slot in enumerate(row):
            target = d_prompt[-slot - 1] if slot < 0 else d_tokens[b, slot]
            target += d_out[b, s].double()
    return d_prompt, d_tokens


def table_rows(table: Tensor, input_ids: Tensor) -> Tensor:
    """The table's rows for ids (B, T), as (B, T, D) in fp64."""
    rows = torch.zeros(*input_ids.shape, table.shape[1], dtype=torch.float64)
    for b, ids in enumerate(input_ids.tolist()):
        for t, token in enumerate(ids):
            rows[b, t] = table[token].double()
    return rows


def table_gradient(d_tokens: Tensor, input_ids: Tensor, vocabulary: int) -> Tensor:
    """The table's gradient (V, D) from those of its rows in use (B, T, D)."""
    d_table = torch.zeros(vocabulary, d_tokens.shape[2], dtype=torch.float64)
    for b, ids in enumerate(input_ids.tolist()):
        for t, token in enumerate(ids):
            d_table[token] += d_tokens[b, t].double()
    return d_table


def carry(field: Tensor, slots: Slots, fill: Sequence[float] | float) -> list[list[float]]:
    """Per-token values (B, T) moved to (B, S), with `fill` (one number, or one per prompt row) at the prompt."""
    values = field.tolist()
    fills = fill if isinstance(fill, Sequence) else None
    return [
        [
            (fills[-slot - 1] if fills is not None else fill) if slot < 0 else values[b][slot]  # type: ignore[misc]
            for slot in row
        ]
        for b, row in enumerate(slots)
    ]


def cpt_epsilon(token_types: Sequence[int], input_epsilon: float, format_epsilon: float, width: int) -> list[float]:
    """PEFT's bound per type code: templates, inputs, and 1e-10 for what must not move."""
    scale = math.sqrt(width / 2048)
    bounds = {1: format_epsilon * scale, 2: input_epsilon * scale, 3: format_epsilon * scale, 0: 1e-10}
    return [bounds[code % 4] for code in token_types]


def cpt(embedding: Tensor, delta: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """rows = embedding + projected; projected = delta, scaled down to norm epsilon where it is longer."""
    projected = torch.zeros(delta.shape, dtype=torch.float64)
    for row in range(delta.shape[0]):
        wide = delta[row].double()
        norm = math.sqrt(sum(value * value for value in wide.tolist()))
        bound = float(epsilon[row])
        projected[row] = wide * (bound / norm) if norm > bound else wide
    return embedding.double() + projected, projected


def cpt_gradient(d_rows: Tensor, token_types: Sequence[int]) -> Tensor:
    """The projection counts as part of the optimizer: delta's gradient is the rows', 0 for labels and separators."""
    d_delta = d_rows.double().clone()
    for row, code in enumerate(token_types):
        if code % 4 == 0:
            d_delta[row] = 0.0
    return d_delta


def cpt_loss(logits: Tensor, labels: Tensor, token_types: Tensor, decay: float) -> Tensor:
    """sum of w * cross entropy over the labels, divided by their number; w = decay ** (number of newer examples)."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(logits.shape[0]):
        codes = token_types[b, 1:].tolist()
        examples = sorted({code for code in codes if code > 0 and code % 4 == 0}, reverse=True)
        for s in range(1, logits.shape[1]):
            target = int(labels[b, s])
            if target == -100:
                continue
            scores = logits[b, s - 1].double()
            loss = torch.log(torch.exp(scores - scores.max().detach()).sum()) + scores.max().detach() - scores[target]
            code = int(token_types[b, s])
            total = total + (decay ** examples.index(code) if code in examples else 1.0) * loss
            count += 1
    return total / max(count, 1)


def prefix_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    index: Sequence[int] | None = None,
    prefix_mask: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One query, one head at a time over the keys that it sees: sum of exp(s) v / sum of exp(s); 0 if it sees none.

    The keys of a row are its prefix's and its own; its query t of T stands at position N + S - T + t.
    """
    (batch, heads, length, width), (_, kv_heads, prefix_length, _) = query.shape, prefix_key.shape
    own = key.shape[2]
    rows = []
    for b in range(batch):
        number = 0 if index is None else index[b]
        for h in range(heads):
            g = h // (heads // kv_heads)
            keys = torch.cat((prefix_key[max(number, 0), g], key[b, g])).double()
            values = torch.cat((prefix_value[max(number, 0), g], value[b, g])).double()
            for t in range(length):
                at = prefix_length + own - length + t
                seen = [
                    j
                    for j in range(at + 1)
                    if (window is None or j > at - window)
                    and (j >= prefix_length or number >= 0)
                    and (j >= prefix_length or prefix_mask is None or prefix_mask[number, j])
                    and (j < prefix_length or mask is None or mask[b, j - prefix_length])
                ]
                if not seen:
                    rows.append(0 * query[b, h, t].double().sum() * values[0])
                    continue
                scores = keys[seen] @ query[b, h, t].double() * (width**-0.5 if scale is None else scale)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.exp(scores - scores.max().detach())
                rows.append(weights @ values[seen] / weights.sum())
    return torch.stack(rows).view(batch, heads, length, -1)
