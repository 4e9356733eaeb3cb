"""What the checks of a family share: its batch, what is right by hand, and what counts as a fault.

By hand means without this package: the prompt's rows and the text's embeddings of one unpadded row, joined by
`torch.cat`, through the base model's own `forward`. A family that wants the ids themselves gets ids, and its embedding
is told what to answer in the prompt's place.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedprompt

from .tiny import EOS, HEADS, PAD, TEXT, build

ROWS, LENGTH, PROMPT, SHORT = 4, 14, 30, 11
TOLERANCE = 2e-4  # of the largest value, in fp32, with weights four times as large as transformers draws them
GRADIENTS = 2e-3  # of the largest entry
MASKS: dict[str, list[tuple[int, int, int]]] = {  # row, first and last column of padding
    "no": [],
    "right": [(1, 8, 14), (3, 11, 14)],
    "left": [(1, 0, 6), (2, 0, 3)],
    "mixed": [(0, 0, 4), (1, 9, 14), (2, 0, 2), (2, 12, 14)],
}
_PACKAGE = str(Path(fusedprompt.__file__).parent)


class Difference(AssertionError):
    """A number that is not what it must be."""


class NoOracle(Exception):
    """The base model cannot do by itself what the prompt is to be added to, or PEFT cannot."""


def is_ours(error: BaseException) -> bool:
    """Whether an error is a refusal of the package's, and not one that fell out of the base model."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    raised = frame.filename.startswith(_PACKAGE) and (frame.line or "").startswith("raise ")
    return raised and isinstance(error, (ValueError, TypeError, NotImplementedError, fusedprompt.BackendUnavailable))


def one_line(error: BaseException, length: int = 160) -> str:
    """An error's kind and the beginning of what it says."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:length]}".rstrip(": ")


@contextlib.contextmanager
def oracle(whose: str = "the base model") -> Iterator[None]:
    """An error in here says that there is nothing to compare with."""
    try:
        yield
    except (Difference, NoOracle, TimeoutError):
        raise
    except Exception as error:
        raise NoOracle(f"{whose} fails: {one_line(error)}") from error


def same(what: str, found: Tensor, right: Tensor, tolerance: float = TOLERANCE) -> None:
    """Refuse values that are further apart than rounding."""
    if found.shape != right.shape:
        raise Difference(f"{what} has shape {tuple(found.shape)} where {tuple(right.shape)} is right")
    if not right.numel():
        return
    found, right = found.detach().float(), right.detach().float()
    if not right.isfinite().all():
        raise NoOracle(f"{what}: what is right is not finite")
    error = float((found - right).abs().max() / right.abs().max().clamp(min=1e-6))
    if not error <= tolerance:
        raise Difference(f"{what} off by {error:.1e}")


def mask_of(kind: str) -> Tensor:
    """(ROWS, LENGTH): which tokens are not padding."""
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    for row, first, last in MASKS[kind]:
        mask[row, first:last] = 0
    return mask


def text_of(mask: Tensor, row: int) -> Tensor:
    """The columns of a row that are not padding."""
    return mask[row].nonzero().flatten()


# Reformer hashes columns, Funnel pools them in pairs: by how many there are in the batch.
HASHING = ("Reformer", "Funnel")


class Family:
    """A tiny model of a class, and what is asked of it."""

    def __init__(self, name: str, task: str, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> None:
        self.name, self.task, self.seed, self.dtype = name, task, seed, dtype
        self.fields = fields
        self.base = self.fresh()
        generator = torch.Generator("cpu").manual_seed(seed)
        self.ids = torch.randint(3, TEXT, (ROWS, LENGTH), generator=generator, device="cpu")
        self._answers: dict[tuple[int, ...], Tensor] = {}

    def fresh(self) -> Any:
        """The base model once more, as nobody has touched it."""
        return build(self.name, self.seed, **self.fields).to(self.dtype)

    @property
    def task_type(self) -> str:
        """The task of a configuration that serves the class."""
        if self.task not in ("SEQ_2_SEQ_LM", "MASKED_LM"):
            return self.task
        return "SEQ_2_SEQ_LM" if getattr(self.base.config, "is_encoder_decoder", False) else "CAUSAL_LM"

    def settings(self, rows: int = PROMPT) -> dict[str, Any]:
        """Fields of a prompt's configuration that a composed base model does not always tell."""
        return {
            "task_type": self.task_type,
            "num_virtual_tokens": rows,
            "num_attention_heads": HEADS,
            "num_layers": 2,
        }

    @cached_property
    def model(self) -> Any:
        """The package's model, with a long prompt and a short one."""
        torch.manual_seed(self.seed + 1)
        model = fusedprompt.get_prompt_model(self.base, fusedprompt.PromptTuningConfig(**self.settings()))
        model.add_adapter("short", fusedprompt.PromptTuningConfig(**self.settings(SHORT)))
        model.set_adapter("default")
        return model.eval()

    def rows(self, adapter: str = "default") -> Tensor:
        """(P, D): an adapter's rows."""
        weight: Tensor = self.model.prompt_encoder[adapter].embedding.weight.detach()
        return weight[: PROMPT if adapter == "default" else SHORT]  # an encoder-decoder's has a second half

    def batch(self, kind: str) -> dict[str, Tensor]:
        """The batch with padding of a kind."""
        mask = mask_of(kind)
        ids = self.ids.clone()
        if self.task == "SEQ_CLS" and getattr(self.base.config, "is_encoder_decoder", False):
            for row in range(ROWS):
                ids[row, text_of(mask, row)[-1]] = EOS  # where they pool
        return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}

    def step_batch(self, kind: str) -> dict[str, Tensor]:
        """The same with labels."""
        given = self.batch(kind)
        if self.task_type == "SEQ_2_SEQ_LM":
            return {**given, "labels": self.labels}
        if self.task_type == "QUESTION_ANS":
            first = given["attention_mask"].argmax(1)
            return {**given, "start_positions": first, "end_positions": first + 3}
        labels = given["input_ids"] % 2 if self.task_type == "TOKEN_CLS" else given["input_ids"]
        if self.task_type == "SEQ_CLS":
            return {**given, "labels": torch.arange(ROWS) % 2}
        return {**given, "labels": labels.masked_fill(given["attention_mask"] == 0, -100)}

    def decoder(self, row: int) -> dict[str, Tensor]:
        """What an encoder-decoder is given for its decoder, for one row."""
        return {"labels": self.labels[row : row + 1]} if self.task_type == "SEQ_2_SEQ_LM" else {}

    def forward(self, given: dict[str, Any], **options: Any) -> Tensor:
        """Values of the text, of each row: (B, T, ...) or (B, ...)."""
        if self.task_type == "SEQ_2_SEQ_LM":
            options["labels"] = self.labels
        elif self.task_type == "CAUSAL_LM":
            options["logits"] = "text"
        return values_of(self.model(**given, **options))

    def pick(self, values: Tensor, mask: Tensor, row: int) -> Tensor:
        """A row's values, without those of padding."""
        return values[row] if self.task_type in ("SEQ_CLS", "SEQ_2_SEQ_LM") else values[row, text_of(mask, row)]

    # By hand

    def own_error(self, labels: bool) -> str | None:
        """The error of the base model, called on ids without a prompt; None: it takes them. labels: a whole step."""
        given = self.step_batch("no") if labels or self.task_type == "SEQ_2_SEQ_LM" else self.batch("no")
        base = self.fresh()
        try:
            with torch.set_grad_enabled(labels):
                output = base(**given)
                if labels:
                    output.loss.backward()
        except Exception as error:
            return one_line(error)
        return None

    @cached_property
    def wants_ids(self) -> bool:
        """Whether embeddings alone are refused, or lack what layers make of the ids."""
        ids, decoder = self.batch("no")["input_ids"][:1], self.decoder(0)
        try:
            with torch.no_grad():
                self.base(inputs_embeds=self.base.get_input_embeddings()(ids), **decoder)
        except Exception:
            return True
        return self.is_layered

    @cached_property
    def feels_padding(self) -> bool:
        """Whether padding at the right changes what the base model makes of a text, without any prompt."""
        if self.name.startswith(HASHING):
            return True
        given = self.batch("right")
        mask = given["attention_mask"]
        try:
            for row in (1, 3):  # an even and an odd number of tokens
                decoder, columns = self.decoder(row), text_of(mask, row)
                one = {name: value[row : row + 1] for name, value in given.items()}
                with torch.no_grad():
                    padded = values_of(self.base(**one, **decoder))
                    alone = values_of(self.base(input_ids=one["input_ids"][:, columns], **decoder))
                same("", self.pick(padded, one["attention_mask"], 0), alone[0])
        except Difference:
            return self.task_type != "SEQ_CLS" or not self.is_causal  # a decoder that pools takes it for text
        except Exception:
            return False
        return False

    @cached_property
    def is_causal(self) -> bool:
        """Whether a text's first values do not depend on its end."""
        ids = self.batch("no")["input_ids"][:1]
        try:
            with torch.no_grad():
                whole, part = (self.base(input_ids=one, output_hidden_states=True) for one in (ids, ids[:, :-2]))
            same("", whole.hidden_states[-1][:, :-2], part.hidden_states[-1])
        except Exception:
            return False
        return True

    def kinds(self) -> dict[str, Any]:
        """Paddings under which a row must be the row alone."""
        return {"no": []} if self.feels_padding else MASKS

    def remark(self) -> str | None:
        """What `kinds` leaves out."""
        reason = "unpadded rows alone: padding changes what the base model itself computes"
        return reason if self.feels_padding else None

    def no_rows(self) -> Tensor:
        """(0, D): no prompt."""
        return self.rows()[:0]

    @cached_property
    def labels(self) -> Tensor:
        """(ROWS, 5): what an encoder-decoder is to say."""
        return torch.randint(3, TEXT, (ROWS, 5), generator=torch.Generator("cpu").manual_seed(9), device="cpu")

    def alone(self, ids: Tensor, rows: Tensor | None = None, **others: Any) -> Any:
        """The base model's output for one row's text (t,) behind a prompt."""
        rows = self.rows() if rows is None else rows
        with oracle(), torch.no_grad():
            if not self.wants_ids:
                text = self.base.get_input_embeddings()(ids.unsqueeze(0))
                joined = torch.cat((rows.unsqueeze(0).to(text.dtype), text), 1)
                return self.base(inputs_embeds=joined, **others)
            with self.answering(rows) as dummy:
                wide = torch.cat((dummy, ids)).unsqueeze(0)
                return self.base(input_ids=wide, **others)

    @property
    def is_layered(self) -> bool:
        """Whether layers look ids up in tables of their own."""
        return any(getattr(part, "hidden_size_per_layer_input", None) for part in self.base.modules())

    @contextlib.contextmanager
    def answering(self, rows: Tensor) -> Iterator[Tensor]:
        """Ids (P,) that are embedded as a prompt's rows: those behind a larger vocabulary, in the encoder and in the
        decoder; or, where layers look ids up in tables of their own, ids whose embeddings are replaced."""
        if self.is_layered:
            with self._replacing(rows) as ids:
                yield ids
            return
        size, width = self.base.get_input_embeddings().weight.shape
        parts = [part for part in self.base.modules() if isinstance(part, torch.nn.Embedding)]
        parts = [part for part in parts if part.weight.shape == (size, width)]
        before = [part.weight for part in parts]
        for part in parts:
            own = rows.to(part.weight.dtype) / float(getattr(part, "embed_scale", None) or 1.0)  # rows are not scaled
            part.weight = torch.nn.Parameter(torch.cat((part.weight.detach(), own)))
        try:
            yield torch.arange(size, size + len(rows))
        finally:
            for part, weight in zip(parts, before):
                part.weight = weight

    @contextlib.contextmanager
    def _replacing(self, rows: Tensor) -> Iterator[Tensor]:
        def answer(_: Any, args: Any, output: Tensor) -> Tensor:
            if output.dim() != 3 or output.shape[1] <= len(rows):
                return output
            expanded = rows.to(output.dtype).expand(len(output), -1, -1)
            return torch.cat((expanded, output[:, len(rows) :]), 1)

        hook = self.base.get_input_embeddings().register_forward_hook(answer)
        try:
            yield torch.full((len(rows),), PAD)
        finally:
            hook.remove()

    def right(self, ids: Tensor, rows: Tensor | None = None, row: int = 0) -> Tensor:
        """What `pick` must give for a row with this text (t,), and these prompt rows in front."""
        key = (row if self.task_type == "SEQ_2_SEQ_LM" else 0, *ids.tolist())
        if rows is None and key in self._answers:
            return self._answers[key]
        found = values_of(self.alone(ids, rows, **self.decoder(row)))[0]
        if self.task_type not in ("SEQ_CLS", "SEQ_2_SEQ_LM"):
            found = found[-len(ids) :]
        if rows is None:
            self._answers[key] = found
        return found


def values_of(output: Any) -> Tensor:
    """The values that an output is about: (B, S, V), (B, C), or start and end (B, S, 2)."""
    for name in ("logits", "prediction_logits"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if getattr(output, "start_logits", None) is None:
        raise NoOracle(f"no logits in an output of {sorted(output)}")
    return torch.stack((output.start_logits, output.end_logits), -1)
