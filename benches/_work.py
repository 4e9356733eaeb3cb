"""The least that an op must do: bytes moved to and from memory, and floating-point operations.

Every input is read once and every output written once. Backward reads the weights and what forward has read again, and
writes the gradients. A time that follows from these numbers is the floor of benches/_limits.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedprompt.ops.head_loss._op import part_size

FORWARD, BACKWARD, STEP = "forward", "forward+backward", "training step"
PREFILL, GENERATE = "prefill", "generate"


@dataclass(frozen=True)
class Work:
    """bytes: moved, at least. flops: in matrix products, a multiplication and an addition counting two."""

    bytes: float
    flops: float


def mlp(rows: int, width: int, hidden: int, itemsize: int) -> dict[str, Work]:
    """P-tuning's MLP, Linear(D, H), Linear(H, H), Linear(H, D), on (P, D)."""
    weights = 2 * width * hidden + hidden * hidden
    biases = 2 * hidden + width
    ends = 2 * rows * width
    return _modes(weights, biases, ends, rows, itemsize)


def projection(rows: int, layers: int, width: int, itemsize: int) -> dict[str, Work]:
    """A prefix's projection, Linear(D, D), Linear(D, 2 L D), on (P, D)."""
    outputs = 2 * layers * width
    weights, biases = width * (width + outputs), width + outputs
    return _modes(weights, biases, rows * (width + outputs), rows, itemsize)


def lstm(rows: int, width: int, hidden: int, itemsize: int) -> dict[str, Work]:
    """Two layers in both directions at batch 1: (P, D) to (P, 2H). Each weight is read once for all steps, as if all of
    them stayed on the chip: larger layers cannot reach that."""
    weights = 2 * 4 * hidden * (width + hidden) + 2 * 4 * hidden * (2 * hidden + hidden)
    biases = 2 * 2 * 2 * 4 * hidden
    ends = rows * (width + 4 * hidden)
    return _modes(weights, biases, ends, rows, itemsize)


def lstm_encoder(rows: int, width: int, hidden: int, itemsize: int) -> dict[str, Work]:
    """P-tuning's LSTM with its head, Linear(2H, 2H) and Linear(2H, D)."""
    stack = lstm(rows, width, hidden, itemsize)
    head = _modes(4 * hidden * hidden + 2 * hidden * width, 2 * hidden + width, rows * width, rows, itemsize)
    return {mode: Work(stack[mode].bytes + head[mode].bytes, stack[mode].flops + head[mode].flops) for mode in stack}


def _modes(weights: int, biases: int, ends: int, rows: int, itemsize: int) -> dict[str, Work]:
    """weights: elements of matrices, each used once per row. ends: elements of input and output."""
    parameters = weights + biases
    return {
        FORWARD: Work((parameters + ends) * itemsize, 2 * rows * weights),
        BACKWARD: Work((3 * parameters + 2 * ends) * itemsize, 3 * 2 * rows * weights),
    }


def splice(
    batch: int, length: int, rows: int, width: int, itemsize: int, prompt_itemsize: int, fields: int = 2
) -> dict[str, Work]:
    """Prompt rows, ids and `fields` of int64 per token into embeddings and fields. Backward sums the prompt's rows."""
    total = rows + length
    read = batch * length * (width * itemsize + 8 * (1 + fields)) + rows * width * prompt_itemsize
    written = batch * total * (width * itemsize + 8 * fields)
    backward = batch * rows * width * itemsize + rows * width * prompt_itemsize
    return {FORWARD: Work(read + written, 0.0), BACKWARD: Work(read + written + backward, 0.0)}


def cpt(rows: int, width: int, itemsize: int) -> dict[str, Work]:
    """Context and change in, rows and projected change out; backward scales the gradient."""
    forward = 4 * rows * width * itemsize
    return {FORWARD: Work(forward, 0.0), BACKWARD: Work(forward + 2 * rows * width * itemsize, 0.0)}


def head_loss(rows: int, width: int, vocabulary: int, itemsize: int) -> dict[str, Work]:
    """Hidden states (R, D), labels and a head (V, D) into a loss; backward into the hidden states' gradient."""
    read = (vocabulary * width + rows * width) * itemsize + 8 * rows
    product = 2.0 * rows * width * vocabulary
    return {FORWARD: Work(read, product), BACKWARD: Work(read + rows * width * itemsize, 2 * product)}


def prefix_attention(
    batch: int, heads: int, kv_heads: int, length: int, prefix: int, width: int, itemsize: int
) -> dict[str, Work]:
    """Queries of all rows to one prefix and, causally, to a row's own keys: each read once. Backward reads all, output
    and its gradient again, and makes five products where forward makes two."""
    queries, keys = batch * heads * length * width, 2 * kv_heads * width * (prefix + batch * length)
    pairs = batch * heads * (length * prefix + length * (length + 1) / 2)
    forward = (2 * queries + keys) * itemsize + 4 * batch * heads * length
    backward = (4 * queries + 2 * keys) * itemsize + 4 * batch * heads * length
    return {
        FORWARD: Work(forward, 4.0 * pairs * width),
        BACKWARD: Work(forward + backward, 14.0 * pairs * width),
    }


def prefix_attention_kernels(
    batch: int, heads: int, kv_heads: int, length: int, prefix: int, width: int, itemsize: int
) -> dict[str, list[Work]]:
    """What each Triton kernel of `prefix_attention` does, where keys stay in L2: of the backward pass d_query, and
    d_key and d_value of the prefix and of the rows, each of which makes the scores again."""
    least = prefix_attention(batch, heads, kv_heads, length, prefix, width, itemsize)[FORWARD]
    queries, sums = batch * heads * length * width * itemsize, 4 * batch * heads * length
    shared, own = (2 * kv_heads * width * one * itemsize for one in (prefix, batch * length))
    to_prefix = 2.0 * batch * heads * length * prefix * width
    to_own = least.flops / 2 - to_prefix
    return {
        FORWARD: [least],
        BACKWARD: [
            least,
            Work(4 * queries + shared + own + 2 * sums, 3 * (to_prefix + to_own)),
            Work(2 * queries + 2 * shared + 2 * sums, 4 * to_prefix),
            Work(2 * queries + 2 * own + 2 * sums, 4 * to_own),
        ],
    }


def mlp_kernels(rows: int, width: int, hidden: int, itemsize: int) -> dict[str, list[Work]]:
    """What each Triton kernel of `mlp` does: one a layer in either direction."""
    return _kernels_of_layers(rows, ((width, hidden), (hidden, hidden), (hidden, width)), itemsize)


def projection_kernels(rows: int, layers: int, width: int, itemsize: int) -> dict[str, list[Work]]:
    """The same of a projection, and the sum of the parts of its last layer's backward, which come from L2."""
    found = _kernels_of_layers(rows, ((width, width), (width, 2 * layers * width)), itemsize)
    return {FORWARD: found[FORWARD], BACKWARD: [*found[BACKWARD], Work(2 * rows * width * itemsize, 0.0)]}


def _kernels_of_layers(rows: int, layers: tuple[tuple[int, int], ...], itemsize: int) -> dict[str, list[Work]]:
    forward, backward = [], []
    for inputs, outputs in layers:
        weights, ends = inputs * outputs, rows * (inputs + outputs)
        forward.append(Work((weights + outputs + ends) * itemsize, 2.0 * rows * weights))
        backward.append(Work((2 * weights + outputs + ends + rows * inputs) * itemsize, 4.0 * rows * weights))
    return {FORWARD: forward, BACKWARD: forward + backward}


def cpt_kernels(rows: int, width: int, itemsize: int) -> dict[str, list[Work]]:
    """What each Triton kernel of `cpt` does: one in either direction."""
    least = cpt(rows, width, itemsize)
    forward = least[FORWARD]
    return {FORWARD: [forward], BACKWARD: [forward, Work(least[BACKWARD].bytes - forward.bytes, 0.0)]}


def splice_kernels(
    batch: int, length: int, rows: int, width: int, itemsize: int, prompt_itemsize: int, fields: int = 2
) -> dict[str, list[Work]]:
    """What each Triton kernel of a prefix does: one in either direction."""
    least = splice(batch, length, rows, width, itemsize, prompt_itemsize, fields)
    forward = least[FORWARD]
    return {FORWARD: [forward], BACKWARD: [forward, Work(least[BACKWARD].bytes - forward.bytes, 0.0)]}


def head_loss_kernels(rows: int, width: int, vocabulary: int, itemsize: int) -> dict[str, list[Work]]:
    """What each kernel of `head_loss` does on a GPU: of each part a product, the loss, and the gradient's product.

    Of several parts the forward pass makes the gradient too.
    """
    size = part_size(rows, vocabulary, is_host=False)
    forward, backward = [], []
    for part in (min(size, rows - start) for start in range(0, rows, size)):
        product = Work((vocabulary * (width + part) + part * width) * itemsize, 2.0 * part * width * vocabulary)
        forward += [product, Work(3 * part * vocabulary * itemsize, 0.0)]
        (backward if size >= rows else forward).append(product)
    return {FORWARD: forward, BACKWARD: forward + backward}
