"""Context-aware prompt tuning: a context's embeddings, and a bounded change of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..base.tasks import TaskType
from ..layouts.batch import Batch
from ..layouts.layout import IGNORE_INDEX, Layout
from ..layouts.padding import unpredicted
from ..ops.cpt.reference import is_label
from .config import PeftType, PromptLearningConfig, as_config, check_number
from .method import Method, Part, PeftEncoder, Targets, register_method
from .module import PromptModule

_FROZEN_EPSILON = 1e-10  # PEFT's bound for rows that must not move (CPTEmbedding.get_epsilon)


@dataclass
class CPTConfig(PromptLearningConfig):
    """Context-aware prompt tuning (Blau et al., arXiv 2410.17222); PEFT class `CPTConfig`.

    `num_virtual_tokens` is always `len(cpt_token_ids)`. Type codes: 0 separators, and with `k` the number of the
    example, 4k+1 input template, 4k+2 input, 4k+3 output template, 4k+4 label.

    Args:
        cpt_token_ids: ids of the context that the prompt starts from.
        cpt_mask: 1 per token, or 0 for tokens that `use_cpt_mask` leaves out; PEFT stores it and never reads it.
        cpt_tokens_type_mask: type code of each token.
        opt_weighted_loss_type: "none", or "decay" to weigh the labels of older examples less.
        opt_loss_decay_factor: weight ratio from one example to the one before it, with "decay".
        opt_projection_epsilon: largest L2 norm of an input token's change, times sqrt(token_dim / 2048).
        opt_projection_format_epsilon: the same for template tokens.
        tokenizer_name_or_path: stored for the reader; not used here.
        use_cpt_mask: take cpt_mask for the context's attention mask: nothing attends to tokens with 0, positions do not
            count them, and their labels are not learned. Not a field of PEFT's: it warns of the key in the file, and
            shows the model all tokens.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None
    use_cpt_mask: dataclasses.InitVar[bool] = False

    method: ClassVar[PeftType | str | None] = PeftType.CPT
    own_arguments: ClassVar[Mapping[str, str]] = {"fusedprompt_use_cpt_mask": "use_cpt_mask"}

    def __post_init__(self, use_cpt_mask: bool) -> None:
        self._uses_mask = use_cpt_mask
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        if self.cpt_mask is None:
            self.cpt_mask = [1] * len(self.cpt_token_ids)
        if self.cpt_tokens_type_mask is None:
            self.cpt_tokens_type_mask = [1] * len(self.cpt_token_ids)
        # As PEFT does: these follow from the context and the base model, whatever was passed.
        self.num_virtual_tokens = len(self.cpt_token_ids)
        self.num_transformer_submodules = 1
        self.num_layers = self.token_dim = self.num_attention_heads = None
        super().__post_init__()

    @property
    def kept(self) -> tuple[int, ...] | None:
        """The tokens of the context that are seen; None for all."""
        if not self._uses_mask:
            return None
        return tuple(index for index, real in enumerate(self.cpt_mask or ()) if real)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **({"fusedprompt_use_cpt_mask": True} if self._uses_mask else {})}

    def validate(self) -> None:
        super().validate()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"task_type: CPTConfig only supports task_type = CAUSAL_LM, got {self.task_type!r}")
        assert self.cpt_tokens_type_mask is not None
        lengths = {field: len(getattr(self, field)) for field in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask")}
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length, got {lengths}"
            )
        if self.num_virtual_tokens != lengths["cpt_token_ids"]:
            raise ValueError(
                f"num_virtual_tokens: expected len(cpt_token_ids) = {lengths['cpt_token_ids']}, "
                f"got {self.num_virtual_tokens}"
            )
        if self.kept == ():
            raise ValueError(f"cpt_mask: expected a 1 with use_cpt_mask=True, got {self.cpt_mask}")
        if any(code < 0 for code in self.cpt_tokens_type_mask):
            raise ValueError(f"cpt_tokens_type_mask: expected codes >= 0, got {min(self.cpt_tokens_type_mask)}")
        if self.opt_weighted_loss_type not in ("none", "decay"):
            raise ValueError(f"opt_weighted_loss_type: expected 'none' or 'decay', got {self.opt_weighted_loss_type!r}")
        for field in ("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"):
            check_number(field, getattr(self, field), 0.0, math.inf, "a finite number >= 0")


class CPTEmbedding(PromptModule):
    """The embeddings of a context plus a learned, bounded change (arXiv 2410.17222); PEFT class `CPTEmbedding`.

    Attributes:
        embedding: `nn.Embedding` (P, D) fp32, frozen: the word embeddings of `cpt_token_ids`.
        delta_embedding: `nn.Embedding` (P, D) fp32, trained, zeros at first.

    Args:
        config: `CPTConfig` with `token_dim`.
        word_embeddings: the base model's input embedding.
    """

    token_types: Tensor

    def __init__(self, config: Any, word_embeddings: nn.Module) -> None:
        config = as_config(config, CPTConfig)
        super().__init__(config)
        self.config = config
        assert config.cpt_token_ids is not None and config.cpt_tokens_type_mask is not None
        if not config.inference_mode:
            self.copy_words(word_embeddings, config.cpt_token_ids)
        self.embedding.requires_grad_(False)
        self.delta_embedding = nn.Embedding(self.total_virtual_tokens, self.token_dim)
        nn.init.zeros_(self.delta_embedding.weight)
        self.register_buffer("token_types", torch.tensor(config.cpt_tokens_type_mask), persistent=False)

    def get_epsilon(self) -> Tensor:
        """The largest norm of each row's change, (P,) fp32."""
        return _context(self.config, self.token_types.device).epsilon.clone()

    def encode(self) -> Tensor:
        """The prompt rows (P, D): context embeddings plus the projected change.

        Where a gradient may follow, the projection is also written back to `delta_embedding`, in place, so that the
        optimizer continues from it as in PEFT.
        """
        if self.inference_mode:
            return self.embedding.weight
        delta = self.delta_embedding.weight
        context = _context(self.config, delta.device)
        return _encode(self.embedding.weight, delta, context.epsilon, context.trainable)


def _epsilons(config: Any) -> tuple[float, float, float, float]:
    """The largest norm of a token's change, by its type code modulo 4."""
    scale = math.sqrt(config.token_dim / 2048)
    template, text = config.opt_projection_format_epsilon * scale, config.opt_projection_epsilon * scale
    return _FROZEN_EPSILON, template, text, template


def _encode(table: Tensor, delta: Tensor, epsilon: Tensor, trainable: Tensor) -> Tensor:
    """`ops.cpt`; the projection is written back to `delta`, into its own memory, where a gradient may follow."""
    rows, projected = ops.cpt(table, delta, epsilon, trainable)
    if torch.is_grad_enabled() and delta.requires_grad:
        with torch.no_grad():
            delta.copy_(projected)
    return rows


def _from_prompt(module: Any, prompt: Tensor) -> None:
    # PEFT saves context + change, and the context is known.
    module.delta_embedding.weight.copy_(prompt.to(module.embedding.weight) - module.embedding.weight)


def _decay(config: Any) -> float:
    factor = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
    return 1.0 if factor is None else float(factor)


def _moved_types(batch: Batch, offset: int) -> Tensor:
    """The type codes of a batch, (B, S), behind those of the context, which take `offset`; without any all are labels
    of one example."""
    labels, types = batch.labels, batch.input_type_mask
    if types is None:
        return torch.full_like(labels, 4 + offset)
    types = types.to(device=labels.device, dtype=labels.dtype)
    return torch.where(types > 0, types + offset, types)


def _targets(config: Any, layout: Layout, batch: Batch) -> Targets:
    """The context's own labels are learned too, and weighted. PEFT.`_cpt_forward`, without changing the caller's
    `input_type_mask`, and with the context's highest code rounded up to a multiple of 4: the codes of the input would
    otherwise mean something else, and no label might be left (huggingface/peft's default mask does that)."""
    labels, given, mask = batch.labels, batch.input_type_mask, batch.attention_mask
    if given is not None and given.shape != labels.shape:
        raise ValueError(
            f"input_type_mask: expected the shape of labels, {tuple(labels.shape)}, got {tuple(given.shape)}"
        )
    types = _moved_types(batch, -(-max(config.cpt_tokens_type_mask) // 4) * 4)
    kept = getattr(config, "kept", None)  # PEFT's has none
    seen = range(len(config.cpt_token_ids)) if kept is None else kept
    context_types, context = (
        labels.new_tensor([values[index] for index in seen])
        for values in (config.cpt_tokens_type_mask, config.cpt_token_ids)
    )
    placed = layout.slots is not None and labels.shape == layout.slots.shape
    carry = layout.overwrite_rows if placed else layout.fill_rows
    types, labels = carry(types, context_types), carry(labels, context)
    if placed and mask is not None:  # prompt rows may stand for padding
        types = types.masked_fill(unpredicted(mask) | (mask == 0), 0)
    return Targets(torch.where(is_label(types), labels, IGNORE_INDEX), types, _decay(config))


# PEFT's module and loss


class Context(NamedTuple):
    """What a CPT configuration says of each of its P tokens, as tensors.

    types: (P,) int64 type codes. targets: (P,) int64 ids where the code marks a label, else -100.
    epsilon: (P,) fp32, the largest norm of each row's change. trainable: (P,) bool.
    """

    types: Tensor
    targets: Tensor
    epsilon: Tensor
    trainable: Tensor


def _context(config: Any, device: torch.device) -> Context:
    """A configuration's `Context`, made once per device: copies to a GPU wait for it."""
    return _context_of(tuple(config.cpt_tokens_type_mask), tuple(config.cpt_token_ids), _epsilons(config), device)


@functools.lru_cache(maxsize=64)
def _context_of(
    codes: tuple[int, ...], ids: tuple[int, ...], epsilons: tuple[float, ...], device: torch.device
) -> Context:
    targets = [token if _is_label(code) else IGNORE_INDEX for token, code in zip(ids, codes)]
    with torch.inference_mode(False):
        return Context(
            torch.tensor(codes, device=device),
            torch.tensor(targets, device=device),
            torch.tensor([epsilons[max(code, 0) % 4] for code in codes], device=device),
            torch.tensor([code % 4 != 0 for code in codes], device=device),
        )


def _is_label(code: int) -> bool:
    return code > 0 and code % 4 == 0


def _run_peft(encoder: Any, indices: Tensor) -> Tensor:
    """The frozen context plus the projected change. PEFT gives the parameter new memory in every call."""
    delta = encoder.delta_embedding.weight
    return _encode(encoder.embedding.weight, delta, *_ball(encoder.config, delta))


def _run_sharded(encoder: Any, indices: Tensor) -> Tensor | None:
    """The same where parameters hold nothing but while their module runs, as under ZeRO-3: PEFT's encoder reads them
    before that, and fails. Only the prompt is projected, not the parameter. None where they are there."""
    if encoder.delta_embedding.weight.dim() == 2:
        return None
    with torch.no_grad():
        table = encoder.embedding(indices)[0]
    delta = encoder.delta_embedding(indices)[0]
    return ops.cpt(table, delta, *_ball(encoder.config, delta))[0]


def _ball(config: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The largest norm of each row's change, and which rows are trained.

    A row that was projected may be longer than its bound by rounding. It stays as it is: so the prompt that is saved
    has the bits of the one that was trained.
    """
    context = _context(config, delta.device)
    with torch.no_grad():
        norm = delta.float().norm(dim=1)
        rounding = 8 * max(torch.finfo(dtype).eps for dtype in (delta.dtype, torch.float32))
        inside = norm <= context.epsilon * (1 + rounding)
        # Twice as much room, because another backend's norm is another sum.
        return torch.where(inside, context.epsilon * (1 + 2 * rounding), context.epsilon), context.trainable


def _peft_targets(config: Any, settings: Any, layout: Layout, batch: Batch) -> Targets:
    """As in PEFT the context's highest code is added to `input_type_mask`, and a batch in which nothing is left to
    learn gives NaN."""
    codes, context = config.cpt_tokens_type_mask, _context(config, batch.labels.device)
    labels, types = batch.labels, _moved_types(batch, max(codes))
    if batch.input_type_mask is not None or not _is_label(4 + max(codes)):
        labels = torch.where(is_label(types), labels, IGNORE_INDEX)
    has_labels = any(map(_is_label, codes[1:]))  # then every row has one
    types, labels = layout.fill_rows(types, context.types), layout.fill_rows(labels, context.targets)
    return Targets(labels, types, _decay(settings), or_nan=not has_labels)


def _peft_side_effect(config: Any, batch: Batch) -> None:
    types = batch.input_type_mask
    if types is not None and batch.labels is not None and types.device == batch.labels.device:
        types += (types > 0) * max(config.cpt_tokens_type_mask)


def _parts(encoder: Any) -> Iterator[Part]:
    for name in ("embedding", "delta_embedding"):
        yield name, getattr(encoder, name), nn.Embedding


register_method(
    Method(
        CPTConfig,
        CPTEmbedding,
        ops=lambda module: ("cpt",),
        frozen=("embedding",),
        from_prompt=_from_prompt,
        targets=_targets,
        kept=lambda config: config.kept,
        peft=PeftEncoder("CPTEmbedding", _parts, _run_peft, _run_sharded, _peft_targets, _peft_side_effect),
    )
)
