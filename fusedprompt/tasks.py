"""What each task adds to a forward pass: where labels go, and how outputs are read back.

Each function takes the model, the batch as the user gave it, and the base model's remaining arguments; it returns the
base model's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base_model import cache_length
from .causal_loss import call_for_loss, call_with_labels, context_loss, may_wait
from .config import CPTConfig, TaskType
from .layout import IGNORE_INDEX, Layout
from .lm_head import Withheld
from .mixed import Mixture, is_context_aware, splice_mixture
from .ops._backend import AUTO, BackendUnavailable
from .ops.cpt.reference import is_label
from .prompt_cache import is_kept, prompt_states
from .routes import SplicedInputs, Turn, choose_layout, place, splice_route
from .shared import PromptStates, prompt_first, run_classifier, run_text
from .sharing import SHARED, SPLICE, choose, why_not_batch, why_not_worth

if TYPE_CHECKING:
    from .model import PromptModel


TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "labels", "position_ids", "token_type_ids")


@dataclass
class Batch:
    """The arguments of a forward call that a prompt touches; the others go to the base model as they are.

    route: "auto", "shared" or "splice". logits: "full" or "text".
    layout: where prompt rows and tokens go, with slots (B, S), if the caller says it. Mask, labels per token, position
        ids and token types are then (B, S) too.
    pool_index: (B,) with a layout: the columns that a sequence classifier reads.
    table: with a layout: the adapters whose prompts, one after another, its slots refer to; None for the active one.
    mixture: the adapter of each row, where they differ.
    """

    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    token_type_ids: Tensor | None = None
    others: dict[str, Any] = field(default_factory=dict)
    route: str = AUTO
    logits: str = "full"
    layout: Layout | None = None
    pool_index: Tensor | None = None
    table: tuple[str, ...] | None = None
    mixture: Mixture | None = None

    @property
    def tokens(self) -> Tensor:
        tokens = self.input_ids if self.input_ids is not None else self.inputs_embeds
        if tokens is None:
            raise ValueError("You have to provide either input_ids or inputs_embeds")
        return tokens

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    def adapters(self, model: PromptModel) -> tuple[str, ...]:
        """The distinct adapters of the batch's rows."""
        if self.mixture is not None:
            return self.mixture.adapters
        if self.table is not None:
            return self.table
        return () if model.active_adapter is None else (model.active_adapter,)

    def prompts(self, model: PromptModel) -> Tensor:
        """(R, D): the table that the slots of a given layout refer to."""
        if self.table is None:
            return model.prompt_table()
        none = torch.empty(0, model.active_config.token_dim or 0, device=self.tokens.device)
        return torch.cat([none, *(model.prompt_table(name) for name in self.table)])

    def prompt_length(self, model: PromptModel) -> int:
        """N: columns that prompts take in the output."""
        return model.prompt_rows_count() if self.mixture is None else self.mixture.longest


def splice(
    model: PromptModel,
    batch: Batch,
    labels: Tensor | None = None,
    pool_last: bool = False,
    turn: Turn | None = None,
) -> SplicedInputs:
    """Put the active adapter's prompt into a batch. pool_last, turn: see `splice_route`, and `place` for given layouts.

    Raises:
        BackendUnavailable: the caller insists on the shared route.
    """
    if batch.route == SHARED:
        choose(SHARED, why_not_batch(model, batch), None)
    tensors: dict[str, Tensor | None] = {name: getattr(batch, name) for name in TENSORS}
    tensors["labels"] = labels
    if batch.mixture is not None:
        return splice_mixture(model, batch.mixture, **tensors, pool_last=pool_last)
    facts, embeddings = model.facts, model.word_embeddings
    if batch.layout is not None:
        prompts = batch.prompts(model)
        return place(facts, embeddings, prompts, batch.layout, **tensors, turn=turn, pool_index=batch.pool_index)
    prompt, start = model.prompt_rows(), model.active_start
    return splice_route(facts, embeddings, prompt, **tensors, pool_last=pool_last, start=start)


def share(model: PromptModel, batch: Batch, all_logits: bool, wait: bool = False) -> PromptStates | None:
    """The prompt's states, if the batch takes the shared route; else None.

    all_logits: the virtual tokens' logits will be in the output. wait: they need not exist before that is read.

    Raises:
        BackendUnavailable: the caller insists on the shared route, and it cannot run.
    """
    if batch.route == SPLICE:
        return None
    objection = why_not_batch(model, batch)
    hidden = batch.others.get("output_hidden_states", model.base_model.config.output_hidden_states)
    kept = objection is None and is_kept(model, batch.mixture)
    if not choose(batch.route, objection, why_not_worth(model, batch, kept)):
        return None
    try:
        return prompt_states(model, all_logits=all_logits, hidden_states=bool(hidden), wait=wait, mixture=batch.mixture)
    except BackendUnavailable:  # found out from the base model's answer
        if batch.route == SHARED:
            raise
        return None


def causal_lm(model: PromptModel, batch: Batch) -> Any:
    """Language modelling: prompt rows have no labels. The output has the prompt's positions too, as PEFT's has."""
    if batch.layout is None or model.facts.causal:
        # Decoders that have token types, such as GPT-2, embed them as words; PEFT drops them too.
        batch.token_type_ids = None
    several = batch.mixture is not None or batch.table is not None
    if several and batch.labels is not None and any(is_context_aware(model, name) for name in batch.adapters(model)):
        raise ValueError("labels: expected None with adapter_names of CPT, whose loss weighs a batch of its own prompt")
    if not several and isinstance(config := model.active_config, CPTConfig):
        return _context_aware(model, config, batch)
    wait = may_wait(model, batch.labels)
    states = share(model, batch, all_logits=batch.logits == "full", wait=wait)
    if states is not None:
        return run_text(model, batch, states, labels=batch.labels, logits=batch.logits, wait=wait)
    labels = batch.labels
    if labels is not None and batch.layout is not None and batch.attention_mask is not None and model.facts.causal:
        labels = labels.masked_fill(_unpredicted(batch.attention_mask), IGNORE_INDEX)
    spliced = splice(model, batch, labels=labels)
    if batch.logits == "text":
        return _read_tokens(model, spliced.layout, batch, spliced.arguments, ("logits",))
    return call_with_labels(model, {**spliced.arguments, **batch.others}, batch.route)


def _unpredicted(mask: Tensor) -> Tensor:
    """(B, S) bool: the columns up to each row's first real one, which at most padding stands in front of."""
    return (mask != 0).cumsum(1) <= 1


def _context_aware(model: PromptModel, config: CPTConfig, batch: Batch) -> Any:
    """CPT: the context's own labels are learned too, and weighted. PEFT.`_cpt_forward`, without changing the caller's
    `input_type_mask`, and with the context's highest code rounded up to a multiple of 4: the codes of the input would
    otherwise mean something else, and no label might be left (huggingface/peft's default mask does that)."""
    as_dict = batch.others.pop("return_dict", None)
    token_types = batch.others.pop("input_type_mask", None)
    wait = batch.logits == "full" and may_wait(model, batch.labels)
    states = share(model, batch, all_logits=True, wait=wait)
    if states is not None:
        layout, _ = choose_layout(model.facts, model.prompt_rows_count(), batch.tokens, batch.attention_mask)
        loss_of = _context_loss(config, layout, batch, token_types)
        output = run_text(model, batch, states, labels=None, logits="full", wait=wait, loss_of=loss_of)
    else:
        spliced = splice(model, batch)
        layout = spliced.layout
        loss_of = _context_loss(config, layout, batch, token_types)

        def call() -> Any:
            return model.base_model(**spliced.arguments, **batch.others, return_dict=True)

        output = call() if loss_of is None else call_for_loss(model, call, loss_of, wait)
    if batch.logits == "text":
        output["logits"] = _at_tokens(output["logits"], layout, batch, batch.attention_mask)
    return output.to_tuple() if as_dict is False else output


def _context_loss(
    config: CPTConfig, layout: Layout, batch: Batch, token_types: Tensor | None
) -> Callable[[Tensor | Withheld], Tensor] | None:
    """What makes the loss of (B, S, V) logits, or of the head that would make them; None without labels."""
    labels = batch.labels
    if labels is None:
        return None
    assert config.cpt_token_ids is not None and config.cpt_tokens_type_mask is not None
    if token_types is None:
        token_types = torch.full_like(labels, 4)
    elif token_types.shape != labels.shape:
        raise ValueError(
            f"input_type_mask: expected the shape of labels, {tuple(labels.shape)}, got {tuple(token_types.shape)}"
        )
    token_types = token_types.to(device=labels.device, dtype=labels.dtype)
    offset = -(-max(config.cpt_tokens_type_mask) // 4) * 4
    token_types = torch.where(token_types > 0, token_types + offset, token_types)
    context_types = labels.new_tensor(config.cpt_tokens_type_mask)
    context_labels = labels.new_tensor(config.cpt_token_ids)
    if batch.layout is None:
        all_types, all_labels = layout.fill_rows(token_types, context_types), layout.fill_rows(labels, context_labels)
    else:
        all_types = layout.overwrite_rows(token_types, context_types)
        all_labels = layout.overwrite_rows(labels, context_labels)
    if batch.layout is not None and batch.attention_mask is not None:
        # Prompt rows may stand for padding.
        all_types = all_types.masked_fill(_unpredicted(batch.attention_mask) | (batch.attention_mask == 0), 0)
    all_labels = torch.where(is_label(all_types), all_labels, IGNORE_INDEX)
    decay = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
    decay = 1.0 if decay is None else decay
    return lambda source: context_loss(source, all_labels, all_types, decay)


def seq_2_seq_lm(model: PromptModel, batch: Batch) -> Any:
    """The prompt goes to the encoder; labels belong to the decoder and stay."""
    batch.token_type_ids = None
    if batch.others.get("encoder_outputs") is not None and batch.mixture is not None:
        raise ValueError("adapter_names: expected None with encoder_outputs, in which the prompts stand already")
    if batch.others.get("encoder_outputs") is not None:
        # The encoder has run already, with the prompt: its mask must cover the prompt's rows.
        mask = batch.attention_mask
        length = batch.others["encoder_outputs"][0].shape[1]
        if mask is not None and mask.shape[1] != length and batch.layout is None:
            rows = model.prompt_rows().shape[0]
            mask = choose_layout(model.facts, rows, mask, mask, start=model.active_start)[0].fill(mask, 1)
        return model.base_model(attention_mask=mask, labels=batch.labels, **batch.others)
    spliced = splice(model, batch)
    return model.base_model(**spliced.arguments, labels=batch.labels, **batch.others)


def seq_cls(model: PromptModel, batch: Batch) -> Any:
    """Labels are per sequence. Decoders read the last position, which cannot be told from padding once the ids are
    embeddings: padding is moved to the left instead (huggingface/peft#764)."""
    states = share(model, batch, all_logits=False)
    if states is not None:
        return run_classifier(model, batch, states)
    turn = Turn.LAST_TO_END if model.facts.causal else Turn.FIRST_TO_START
    spliced = splice(model, batch, pool_last=True, turn=turn)
    return model.base_model(**spliced.arguments, labels=batch.labels, **batch.others)


def _turn_of_encoder(model: PromptModel) -> Turn | None:
    """An encoder that numbers positions by itself must find its padding last."""
    return None if model.facts.causal or model.facts.takes_position_ids else Turn.FIRST_TO_START


def token_cls(model: PromptModel, batch: Batch) -> Any:
    """The logits are those of the tokens. So are the labels, except that with a given layout they are of the output."""
    spliced = splice(model, batch, labels=batch.labels, turn=_turn_of_encoder(model))
    return _read_tokens(model, spliced.layout, batch, spliced.arguments, ("logits",))


def question_answering(model: PromptModel, batch: Batch) -> Any:
    """Answer positions count tokens: they move with the tokens, and the logits are the tokens' own."""
    spliced = splice(model, batch, turn=_turn_of_encoder(model))
    arguments = spliced.arguments
    size, length = batch.shape
    mask = None if batch.layout is None else arguments.get("attention_mask")
    positions = spliced.layout.token_positions(size, length, batch.tokens.device, mask)
    total = spliced.layout.output_length(length)
    for name in ("start_positions", "end_positions"):
        given = batch.others.pop(name, None)
        if given is not None:
            index = given.view(size, -1)[:, :1].clamp(min=0)
            moved = positions.gather(1, index.clamp(max=length - 1)).squeeze(1)
            # transformers ignores answers at or behind the end of the sequence; so they stay there.
            arguments[name] = torch.where(index.squeeze(1) < length, moved, total)
    return _read_tokens(model, spliced.layout, batch, arguments, ("start_logits", "end_logits"))


def feature_extraction(model: PromptModel, batch: Batch) -> Any:
    """Hidden states, with the prompt's positions first, as PEFT returns them."""
    spliced = splice(model, batch)
    return model.base_model(**spliced.arguments, **batch.others)


def _read_tokens(
    model: PromptModel, layout: Layout, batch: Batch, arguments: dict[str, Any], names: tuple[str, ...]
) -> Any:
    """Call the base model and cut its per-position outputs `names` down to the tokens, in the tokens' order."""
    as_dict = batch.others.pop("return_dict", None)
    output = model.base_model(**arguments, **batch.others, return_dict=True)
    for name in names:
        output[name] = _at_tokens(output[name], layout, batch, arguments.get("attention_mask"))
    return output.to_tuple() if as_dict is False else output


def _at_tokens(values: Tensor, layout: Layout, batch: Batch, mask: Tensor | None) -> Tensor:
    """(B, T, X): the rows of (B, S, X) values that belong to the tokens. mask: (B, S)."""
    size, length = batch.shape
    if layout.slots is None:
        return values[:, layout.num_prompt_rows :]
    positions = layout.token_positions(size, length, values.device, None if batch.layout is None else mask)
    return values[torch.arange(size, device=values.device).unsqueeze(1), positions]


def continue_from_cache(model: PromptModel, batch: Batch, past_key_values: Any) -> Any:
    """Tokens after a cache in which the prompt stands: it is not put in again, only counted in the mask."""
    rows = model.prompt_rows_count()
    arguments: dict[str, Any] = {"past_key_values": past_key_values}
    length = batch.shape[1]
    mask, total = batch.attention_mask, cache_length(past_key_values) + batch.shape[1]
    if mask is not None:
        padding = None
        if mask.shape[1] == total - rows:
            layout, padding = choose_layout(model.facts, rows, mask, mask, start=model.active_start)
            mask = (Layout.prefix(rows) if prompt_first(past_key_values) else layout).fill(mask, 1)
        elif mask.shape[1] != total:
            raise ValueError(
                f"attention_mask: expected {total - rows} columns (cached and new tokens) or {total} (and the prompt), "
                f"got {mask.shape[1]}"
            )
        arguments["attention_mask"] = mask
        if padding is not None and batch.position_ids is None and model.facts.takes_position_ids:
            positions = torch.arange(total - length, total, device=mask.device) - padding.unsqueeze(1)
            arguments["position_ids"] = positions.clamp(min=0) + model.facts.first_position
    if batch.position_ids is not None:
        arguments["position_ids"] = batch.position_ids + rows
    for name in ("input_ids", "inputs_embeds", "labels"):
        if getattr(batch, name) is not None:
            arguments[name] = getattr(batch, name)
    return model.base_model(**arguments, **batch.others)


FORWARD: dict[TaskType, Callable[[PromptModel, Batch], Any]] = {
    TaskType.CAUSAL_LM: causal_lm,
    TaskType.SEQ_2_SEQ_LM: seq_2_seq_lm,
    TaskType.SEQ_CLS: seq_cls,
    TaskType.TOKEN_CLS: token_cls,
    TaskType.QUESTION_ANS: question_answering,
    TaskType.FEATURE_EXTRACTION: feature_extraction,
}
