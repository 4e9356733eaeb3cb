"""A call whose prompts go in, decided in full: the route, where everything stands, and what becomes of the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base import check
from ..base.first_use import first_use
from ..layouts.batch import Batch, Placed, check_length, place, put_in_front
from ..layouts.layout import IGNORE_INDEX, Layout
from ..layouts.mixed_batch import place_mixture
from ..layouts.mixture import arrange
from ..layouts.padding import Turn, choose_layout, count_padding, may_be_padded, unpredicted
from ..layouts.prompt import Prompt
from ..methods import Targets, find_method
from ..ops._backend import AUTO
from . import choice
from .attention import cost_rule, why_not_attend
from .call import FULL, OURS, PEFT, PREFIX, SHARED, SPLICE, TEXT, Plan, refuse
from .host import Host
from .loss import Answers, Loss, NextToken, OwnFunction, PerToken, Weighted, has_transformers_loss, masks_labels
from .prefix import behind_prefix, check_padding, check_served, padding_behind, widened


class Planner:
    """A call whose prompts go in: what is known of it, for the two routes to plan with."""

    def __init__(self, host: Host, begun: Plan, active: Prompt, given: Layout | None) -> None:
        assert begun.task is not None
        self.host, self.begun, self.active, self.given = host, begun, active, given
        self.call, self.placement, self.task = begun.call, begun.placement, begun.task
        self.mixture, self.table = begun.mixture, begun.table
        self.batch, self.facts = begun.fields, host.facts
        self.rows = active.rows if self.mixture is None else self.mixture.longest
        self.in_cache = (active if self.mixture is None else (*self.mixture.prompts, active)[0]).in_cache
        if self.placement == OURS and not self.in_cache and self._has_gaps():
            self.facts = replace(self.facts, padding_last=self._wants_padding_last())
        self.targets_of = self._own_targets()
        self.labelled = self.batch.labels is not None and self.task.predicts_next

    def plan(self) -> Plan:
        """The route, and what becomes of the call on it: the cheapest question first."""
        host, batch, route = self.host, self.batch, self.call.route
        if self.in_cache:
            return replace(self.begun, **self._prefixed())
        if (
            self.facts.needs_layer_inputs
            and batch.input_ids is None
            and self.call.others.get("per_layer_inputs") is None
        ):
            raise ValueError("inputs_embeds: expected per_layer_inputs (B, T, layers, width) beside them, or input_ids")
        objection: str | None = "it was asked for" if route == SPLICE else self._why_not_this()
        cost = None
        if route == AUTO:
            kept, device = choice.is_kept(host, self.table), batch.tokens.device.type
            cost = choice.cost_rule(self.rows, *batch.shape, kept, device, len(self.table))
        if objection is None and cost is None:
            objection = choice.why_not_now(host) or self._why_not_found()
        if objection is not None and route == SHARED:
            raise choice.RouteUnavailable(objection)
        why = objection or cost
        return replace(self.begun, why=why, pays=cost is None, **(self._spliced() if why else self._shared()))

    def _why_not_this(self) -> str | None:
        """An objection to sharing this call's prompts that asks no part of the base model, or None."""
        host = self.host
        objection = choice.why_not_prompts(host, self.table)
        if objection is None and self.placement == PEFT:
            objection = choice.why_not_as_peft(self.facts)
        objection = objection or choice.why_not_batch(
            host, self.batch, self.call.others, self.given is not None, self.rows
        )
        return objection or (choice.why_not_loss(host) if self.labelled and self.targets_of is None else None)

    def _why_not_found(self) -> str | None:
        """An objection from what the base model did on its first use. PEFT too has padding behind the prompt."""
        found = first_use(self.host.base_model, self.facts, shares=True)
        gaps = self.placement == OURS and found.gap is not None and self._has_gaps()
        return found.sharing or (found.gap if gaps else None)

    def _wants_padding_last(self) -> bool:
        """Whether padding changes a row of this base model where it stands otherwise, in front of it or behind the
        prompt."""
        host, facts = self.host, self.facts
        if facts.causal:  # with position ids they do as they are told, but for a state
            asks = (facts.stateful or not facts.places_position_ids) and not self.task.pools
            return asks and first_use(host.base_model, facts, host.sharing.objection is None).lead is not None
        if not facts.takes_position_ids:
            return False  # it stands there anyway
        # Nobody sees the order of an encoder's columns behind a decoder.
        return (
            facts.encoder_decoder or facts.windowed or first_use(host.base_model, facts, shares=False).gap is not None
        )

    def _has_gaps(self) -> bool:
        """Whether padding may stand between a shared prompt and its text."""
        mask, mixture = self.batch.attention_mask, self.mixture
        if not isinstance(mask, Tensor):  # what it is instead is refused where its shape is checked
            mask = None
        uneven = mixture is not None and not mixture.even
        return uneven or may_be_padded(mask, 0) or (self.task.pools and may_be_padded(mask, -1))

    def _own_targets(self) -> Callable[[Layout, Batch], Targets] | None:
        """What a method's own loss counts, of a layout and fields; None for the base model's loss."""
        host, own = self.host, {prompt.name: find_method(prompt.method) for prompt in self.table}
        has_own = next((one.name for one in own.values() if one is not None and one.targets is not None), None)
        if self.mixture is not None or (self.call.slots is not None and self.call.adapter_names is not None):
            if has_own and self.batch.labels is not None:
                raise ValueError(
                    f"labels: expected None with adapter_names of {has_own}, whose loss weighs a batch of its prompt"
                )
            return None
        name, method = self.active.name, own.get(self.active.name)
        if method is None or method.targets is None or not self.task.predicts_next:
            return None
        config, targets = host.peft_config[name], method.targets
        if self.placement == PEFT and method.peft is not None and method.peft.targets is not None:
            settings, as_peft = host.peft_config["default"], method.peft.targets
            return lambda layout, batch: as_peft(config, settings, layout, batch)
        return lambda layout, batch: targets(config, layout, batch)

    def _waits(self) -> bool:
        """Whether logits are left until they are read: a shared prompt's, and the text's if their head can wait too."""
        return self.labelled and not self.host.text_head.read and self._could_wait()

    def _could_wait(self) -> bool:
        return not torch.compiler.is_compiling() and choice.why_not_wait(self.host) is None

    def _others(self) -> dict[str, Any]:
        """What else the base model gets; PEFT asks CPT's base model for an output with names."""
        named = self.placement == PEFT and self.targets_of is not None and self.labelled
        return {**self.call.others, **({"return_dict": True} if named else {})}

    # Route prefix

    def _prefixed(self) -> dict[str, Any]:
        """Text behind an adapter's keys and values. Its labels and all that comes out are the text's alone."""
        host, facts, task, mixture, batch = self.host, self.facts, self.task, self.mixture, self.batch
        others = self._others()
        ours, shares_text = self.placement == OURS, any(prompt.shared is not None for prompt in self.table)
        if shares_text:
            self._check_text()
        check_served(host, self.table or (self.active,), self.call.route, as_peft=not ours)
        if facts.encoder_decoder:  # the prefix is its decoder's
            encoded = others.get("encoder_outputs") is not None
            if ours and not encoded:
                batch.checked(facts)
                batch = padding_behind(batch, others, task)
            others = widened(host, others, self.rows, mixture, 1 if encoded else batch.shape[1])
            return {"route": PREFIX, "fields": batch, "others": others}
        if ours:
            batch.checked(facts)
            uneven = mixture is not None and not mixture.even
            check_padding(host, batch.attention_mask, self.rows, batch.shape[1], uneven, task.pools)
            if self._is_of_next_tokens() and may_be_padded(batch.attention_mask, 0) and not shares_text:
                # Nothing predicts a row's first token, as without padding.
                unseen = unpredicted(batch.attention_mask)
                batch = replace(batch, labels=batch.labels.masked_fill(unseen, IGNORE_INDEX))
        of_tokens = self._of_tokens(batch, others)
        batch = batch if of_tokens is None else replace(batch, labels=None)
        fields, looks_up = behind_prefix(facts, batch, self.rows, mixture, task.pools, not ours)
        fields, layout = replace(fields, input_type_mask=None), Layout.prefix(self.rows)
        found = {"route": PREFIX, "fields": fields, "others": others, "looks_up": looks_up, "layout": layout}
        found["loss"] = of_tokens
        found["joined"] = self._why_joined()
        withholds = self.labelled and self._withholds(others)
        if shares_text and self.labelled:
            mask, counted = batch.attention_mask, others.get("num_items_in_batch")
            padding = count_padding(mask)[0] if ours and may_be_padded(mask, 0) else None
            waits = withholds and not host.text_head.read
            found |= {"loss": NextToken(batch.labels, padding, None, counted), "fields": replace(fields, labels=None)}
            return {**found, "waits": waits, "reads": withholds and not waits}
        if not withholds:
            return found
        waits = not host.text_head.read
        loss = NextToken(counted=others.get("num_items_in_batch")) if waits else None
        return {**found, "loss": loss, "waits": waits, "reads": not waits}

    def _check_text(self) -> None:
        """Refuse a batch whose rows cannot read a prefix and the text behind it from the cache."""
        objection = choice.why_not_length(self.host, self.rows + self.batch.shape[1])
        if self.labelled and not has_transformers_loss(self.host.base_model, self.facts):
            objection = objection or "the base model's loss is its own"
        if objection is not None:
            refuse("shared_prefix", self.call.shared_prefix, f"with {self.table[0].method}, because {objection}")

    def _of_tokens(self, batch: Batch, others: dict[str, Any]) -> PerToken | None:
        """The loss of a classifier of tokens, if its own would take the mask of prefix and text for the text's."""
        labels, mask = batch.labels if self.placement == OURS else others.get("labels"), batch.attention_mask
        if self.task.labels != "tokens" or self.task.predicts_next or not isinstance(labels, Tensor):
            return None
        if not masks_labels(self.host.base_model):
            return None
        others.pop("labels", None)
        if self.placement == OURS and mask is not None:  # PEFT's counts labels of padding too
            labels = labels.masked_fill(mask == 0, IGNORE_INDEX)
        return PerToken(labels)

    # Route splice

    def _spliced(self) -> dict[str, Any]:
        task, call, logits = self.task, self.call, self.call.logits
        placed = self._placed()
        fields, others = placed.batch, self._others()
        cuts = () if self.placement == PEFT else task.token_outputs
        loss: Loss | None = None
        waits = reads = turned = False
        if self.targets_of is not None:
            cuts = (*cuts, "logits") if logits == TEXT else cuts
            if self.labelled:
                loss = Weighted(self.targets_of(placed.layout, fields))
                waits = logits == FULL and self._waits()
            fields = replace(fields, labels=None)
        elif logits == TEXT:
            cuts = (*cuts, "logits")
        elif self._is_turned(placed):
            turned = True
        elif self.labelled and call.route == AUTO and self._withholds(others):
            waits = not self.host.text_head.read
            loss = NextToken(counted=others.get("num_items_in_batch")) if waits else None
            reads = not waits
        if self.placement == OURS and task.answers:
            loss = self._move_answers(placed, others)
        found = {"layout": placed.layout, "carries": placed.carries, "others": others, "loss": loss, "waits": waits}
        fields = replace(fields, input_type_mask=None)
        found |= {"reads": reads, "turned": turned, "logits": logits, "cuts": cuts}
        return {"route": SPLICE, "fields": fields, **found}

    def _is_turned(self, placed: Placed) -> bool:
        """Whether a language model's tokens stand in another order than they were given in, behind one prompt."""
        own = self.placement == OURS and self.task.predicts_next and self.given is None and self.mixture is None
        return own and placed.layout.slots is not None and not self.active.start and not self.facts.padding_first(False)

    def _placed(self) -> Placed:
        """Prompts, tokens and padding in their places."""
        facts, task, batch = self.facts, self.task, self.batch
        if self.placement == PEFT:
            layout, types = self._prefix(), batch.token_type_ids
            types = None if types is None else layout.fill(types, 0).long()
            return Placed(layout, replace(batch, token_type_ids=types), carries=True)
        # CPM-Ant masks what comes first.
        padding_first = task.pools or (facts.needs_ids and facts.causal)
        if self.mixture is not None:
            mixture = replace(self.mixture, task=replace(task, predicts_next=self._is_of_next_tokens()))
            return place_mixture(mixture, facts, batch, padding_first)
        if self.given is None:
            return put_in_front(facts, self.rows, batch, pool_last=padding_first, start=self.active.start)
        mask = batch.attention_mask
        if mask is not None and facts.causal and self.targets_of is None and self._is_of_next_tokens():
            batch = replace(batch, labels=batch.labels.masked_fill(unpredicted(mask), IGNORE_INDEX))
        return place(facts, self.given, batch, Turn.of(task, facts), self.call.pool_index)

    def _prefix(self) -> Layout:
        """PEFT's place: in front of text and padding."""
        return Layout.prefix(self.rows) if self.mixture is None else self.mixture.prefix()

    def _is_of_next_tokens(self) -> bool:
        """Whether labels are compared with what stands before them, so that nothing predicts a row's first."""
        return self.labelled and has_transformers_loss(self.host.base_model, self.facts)

    def _withholds(self, others: Mapping[str, Any]) -> bool:
        """Whether the base model's head can wait: nothing but labels and logits decides about its loss, and its output
        has names."""
        as_dict, config = others.get("return_dict"), self.host.base_model.config
        named = getattr(config, "return_dict", True) if as_dict is None else as_dict
        if not named or getattr(config, "output_router_logits", False):
            return False
        plain = ("use_cache", "return_dict", "output_hidden_states", "num_items_in_batch")
        if not all(value is None or name in plain for name, value in others.items()):
            return False
        return self._could_wait() and self.host.text_head.may_be_withheld(self.host.base_model)

    def _move_answers(self, placed: Placed, others: dict[str, Any]) -> Answers | None:
        """Answer positions count tokens: they move with the tokens. Their loss is that of the tokens' own logits."""
        size, length = self.batch.shape
        mask = None if self.given is None else placed.batch.attention_mask
        total, given = placed.layout.output_length(length), []
        for name in self.task.answers:
            value = others.pop(name, None)
            given.append(value)
            if value is not None:
                check.tensor(name, value, "(B,)", value.dim() if isinstance(value, Tensor) and value.dim() == 2 else 1)
                check.integral(name, value)
                if value.shape[0] != size:
                    raise ValueError(f"{name}: expected shape (B,) = ({size},), got {tuple(value.shape)}")
                positions = placed.layout.token_positions(size, length, self.batch.tokens.device, mask)
                index = value.view(size, -1)[:, :1].clamp(min=0)
                moved = positions.gather(1, index.clamp(max=length - 1)).squeeze(1)
                # transformers ignores answers at or behind the end of the sequence; so they stay there.
                others[name] = torch.where(index.squeeze(1) < length, moved, total)
        if any(value is None for value in given):
            return None
        start, end = (value.view(size, -1)[:, 0] for value in given)
        return Answers((start, end), others.get("num_items_in_batch"))

    # Route shared

    def _shared(self) -> dict[str, Any]:
        """Text behind a prompt in the cache: mask and positions count the prompt, and padding changes nothing."""
        fields, layout, padding = self._text()
        logits = self.call.logits
        loss = self._loss_of_text(layout, padding) if self.labelled else None
        fields = replace(fields, labels=None if self.labelled else fields.labels, input_type_mask=None)
        cuts: tuple[str, ...] = ()
        waits = self._waits()
        if self.targets_of is not None:  # of logits of prompt and text
            cuts, waits, logits = (("logits",) if logits == TEXT else ()), waits and logits == FULL, FULL
        found = {"layout": layout, "fields": fields, "loss": loss, "waits": waits, "logits": logits, "cuts": cuts}
        found["joined"] = self._why_joined()
        return {"route": SHARED, "looks_up": self.task.pools, "others": self._others(), **found}

    def _why_joined(self) -> str | None:
        """Why each row gets a copy of the prefix, joined with its own keys; None where attention reads the one."""
        size, length = self.batch.shape
        cost, others = cost_rule(self.rows, size), self.call.others
        if cost is not None:
            return cost
        if others.get("past_key_values") is not None:
            return "the caller's own cache holds the prefix"
        if others.get("output_attentions") or getattr(self.host.base_model.config, "output_attentions", False):
            return "attention's weights are asked for"
        return why_not_attend(self.host, self.rows + length)

    def _text(self) -> tuple[Batch, Layout, Tensor | None]:
        """The text's fields, where prompt and text stand in the output, and (B,) padding at the left of each row."""
        facts, rows, mixture, batch = self.facts, self.rows, self.mixture, self.batch
        (size, length), tokens = batch.shape, batch.tokens
        mask, positions = batch.attention_mask, batch.position_ids
        if self.placement == PEFT:  # prompt, padding, text, with positions left to the base model
            wide_mask = None if mask is None else F.pad(mask, (rows, 0), value=1)
            if facts.first_position:  # it would count padding's ids, which PEFT's embeddings do not show it
                counted = torch.arange(rows, rows + length, device=tokens.device) + facts.first_position
                batch = replace(batch, position_ids=counted.unsqueeze(0))
            return replace(batch, attention_mask=wide_mask), self._prefix(), None
        check_length(facts, rows, length)
        batch.checked(facts)
        # With ids the base model would look for a classifier's padding by its token; the mask has said where it is.
        if self.task.pools and mask is not None and may_be_padded(mask, -1):
            batch = _padding_to_left(batch, mask)
            mask, positions, tokens = batch.attention_mask, batch.position_ids, batch.tokens
        behind: int | Tensor = rows
        if mixture is None:
            layout, padding = choose_layout(facts, rows, tokens, mask)
            wide_mask = None if mask is None else F.pad(mask, (rows, 0), value=1)
        else:
            arranged = arrange(mixture, facts, tokens, mask)
            layout, padding, behind = arranged.layout, arranged.padding, mixture.count.unsqueeze(1)
            wide_mask = mixture.prompt_first_mask(mask, length)
        if positions is not None:
            positions = positions.expand(size, length) + behind
        elif facts.places_position_ids and (padding is not None or not isinstance(behind, int) or facts.first_position):
            text = torch.arange(length, device=tokens.device)
            text = text.unsqueeze(0) if padding is None else text - padding.unsqueeze(1)
            positions = text.clamp(min=0) + (behind + facts.first_position)
        return replace(batch, attention_mask=wide_mask, position_ids=positions), layout, padding

    def _loss_of_text(self, layout: Layout, padding: Tensor | None) -> Loss:
        """The base model's loss as it would be over prompt and text, of whose virtual tokens only the last counts."""
        if self.targets_of is not None:
            return Weighted(self.targets_of(layout, self.batch))
        labels, counted, base = self.batch.labels, self.call.others.get("num_items_in_batch"), self.host.base_model
        if not has_transformers_loss(base, self.facts):
            # A loss of its own gets what it would get from splice.
            return OwnFunction(base, layout.fill(labels, IGNORE_INDEX), counted)
        mixture = self.mixture
        alone = None if mixture is None or mixture.even else mixture.count == 0
        return NextToken(labels, padding, alone, counted)


def _padding_to_left(batch: Batch, mask: Tensor) -> Batch:
    """Padding at the right of each row moved to its left."""
    (size, length), shift = batch.shape, -count_padding(mask)[1]
    turned = Layout.insert(0, length, torch.zeros_like(shift), shift)
    ids, embeds, positions = batch.input_ids, batch.inputs_embeds, batch.position_ids
    if ids is not None:
        ids = turned.fill(ids, 0)
    if embeds is not None:
        embeds = embeds.gather(1, turned.given_slots.unsqueeze(-1).expand_as(embeds))
    if positions is not None:
        positions = turned.fill(positions.expand(size, length), 0)
    mask = turned.fill(mask, 0)
    return replace(batch, input_ids=ids, inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
