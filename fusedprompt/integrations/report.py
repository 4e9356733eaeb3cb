"""What a patch does with each adapter, what it leaves alone, and which of PEFT's defects remain: in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..base.facts import fusable_table
from ..base.tasks import task_of
from ..methods import method_of
from ..methods.method import name_of
from ..routes import explain
from ..routes.call import SHARED, SPLICE
from ..routes.choice import why_not_head_loss, why_not_model
from .encoders import why_not_adapter, why_not_encoder
from .prefill import why_not_generate
from .record import Record


@dataclass(frozen=True)
class Defect:
    """Something that PEFT gets wrong, for some tasks and methods (none named: all).

    fixed: what `fix=True` makes of it; empty where nothing here can correct it.
    """

    what: str
    fixed: str
    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    not_of: tuple[str, ...] = ()

    def concerns(self, task: str, method: str) -> bool:
        of_method = method not in self.not_of and (not self.methods or method in self.methods)
        return of_method and (not self.tasks or task in self.tasks)


_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")

DEFECTS = (
    Defect(
        "left padding stands between prompt and text, and position_ids are dropped",
        "padding comes first, and positions count text alone; in generate too",
        ("CAUSAL_LM",),
        not_of=_PREFIXES,
    ),
    Defect(
        "padding between a prefix and its text is counted by positions",
        "positions count text alone",
        ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"),
        _PREFIXES,
    ),
    Defect(
        "QUESTION_ANS drops token_type_ids and position_ids",
        "both arguments are passed on",
        ("QUESTION_ANS",),
        _PREFIXES,
    ),
    Defect(
        "generate behind a prefix fails with use_cache=False, assisted decoding, embeddings or a conversation's cache",
        "this package's generate serves them",
        ("CAUSAL_LM",),
        _PREFIXES,
    ),
    Defect(
        "gradient checkpointing that is switched on later ends in a size mismatch; here it is refused in words",
        "",
        methods=_PREFIXES,
    ),
    Defect(
        "a decoder of an even number of layers has the same prefix in layers l and l + half of them",
        "",
        ("SEQ_2_SEQ_LM",),
        _PREFIXES,
    ),
    Defect(
        "TOKEN_CLS labels do not fit the logits, which are longer by the prompt",
        "logits of the tokens alone",
        ("TOKEN_CLS",),
        not_of=_PREFIXES,
    ),
    Defect(
        "QUESTION_ANS answers are not moved behind the prompt; token_type_ids and position_ids are dropped",
        "answers move with their tokens, logits are the tokens' own, and both arguments are passed on",
        ("QUESTION_ANS",),
        not_of=_PREFIXES,
    ),
    Defect(
        "SEQ_CLS on a decoder pools the last position, padding or not",
        "padding is moved to the left, so that the last token is pooled",
        ("SEQ_CLS",),
        not_of=_PREFIXES,
    ),
    Defect(
        "saving in training mode stores a random sample of the encoder's dropout",
        "the prompt is saved as in evaluation",
        methods=("P_TUNING",),
    ),
    Defect(
        "load_adapter into an adapter in training takes the saved output for the encoder's input",
        "the loaded prompt is used as it is, and training goes on without the encoder",
        methods=("P_TUNING", "CPT"),
    ),
    Defect("CPT reads its loss's settings from the adapter 'default'", "each adapter's own", methods=("CPT",)),
    Defect(
        "QUESTION_ANS and FEATURE_EXTRACTION never hand task_ids on, and raise",
        "each row's prompt is its own task's",
        ("QUESTION_ANS", "FEATURE_EXTRACTION"),
        ("MULTITASK_PROMPT_TUNING",),
    ),
    Defect(
        "SEQ_2_SEQ_LM drops decoder_input_ids, or raises for them without labels",
        "they are passed on",
        ("SEQ_2_SEQ_LM",),
        ("MULTITASK_PROMPT_TUNING",),
    ),
    Defect(
        "SEQ_2_SEQ_LM trains prompt rows in front of the decoder's tokens, and generates without them",
        "the decoder gets none in training either",
        ("SEQ_2_SEQ_LM",),
        ("MULTITASK_PROMPT_TUNING",),
    ),
    Defect(
        "an adapter that began with another's values reads that one's file again whenever it is loaded",
        "",
        methods=("MULTITASK_PROMPT_TUNING",),
    ),
    Defect("CPT changes the caller's input_type_mask", "it stays as it is", methods=("CPT",)),
    Defect(
        "CPT's loss is no number where the context's largest type code is no multiple of 4, as by default",
        "the text's codes begin behind the next multiple of 4",
        methods=("CPT",),
    ),
    Defect("CPT's cpt_mask is not read", "", methods=("CPT",)),
    Defect("training P-tuning cannot be resumed from a saved adapter", "", methods=("P_TUNING",)),
    Defect("parameters of adapters that are inactive or loaded for inference require gradients", ""),
)


def report(patch: Record) -> str:
    """See `Patch.report`."""
    import peft
    import transformers

    model = patch.model
    lines = [
        f"fusedprompt on {type(model).__name__} (PEFT {peft.__version__}, transformers {transformers.__version__}): "
        f"backend {patch.backend}, route {patch.route}, {'fixes on' if patch.fix else 'as PEFT'}"
    ]
    if not patch.active:
        return "\n".join([*lines, "reverted: everything is PEFT's"])
    left = dict(patch.left_alone)
    for name, config in model.peft_config.items():
        lines.append(f"  {name}{', active' if name == model.active_adapter else ''}: {_adapter(patch, name, config)}")
        objection = why_not_adapter(config) or why_not_encoder(model.prompt_encoder[name], config)
        if objection is not None:
            left[f"{'adapter' if why_not_adapter(config) else 'encoder of'} {name}"] = objection
    if patch.fix or "prepare_inputs_for_generation" in patch.replaced:
        lines.append(f"  generate: {_generate(patch)}")
    elif hasattr(model.base_model, "generate"):
        left["generate"] = "PEFT's own, but with adapter_names; its prompt comes from the encoder above"
    objection = why_not_head_loss(patch.host)
    served = [config for config in model.peft_config.values() if config.task_type and why_not_adapter(config) is None]
    makes_loss = any(task_of(config.task_type).predicts_next for config in served) and patch.host.facts.causal
    if objection is not None and makes_loss:
        left["loss"] = f"made of logits, because {objection}"
    embeddings = model.word_embeddings
    if "forward" in patch.replaced and embeddings is not None and fusable_table(embeddings) is None:
        left["word embeddings"] = f"{type(embeddings).__name__} may do more than look up rows, and is called"
    alone = [f"  {part}: {reason}" for part, reason in left.items()]
    alone += [f"  calls that went to PEFT: {reason}" for reason in sorted(patch.refused)]
    alone += [f"  calls of generate without a shared prompt: {reason}" for reason in sorted(patch.generated_alone)]
    alone += [f"  calls that were spliced: {reason}" for reason in sorted(patch.spliced)]
    lines += ["left alone:", *alone] if alone else []
    return "\n".join([*lines, *_defects(patch)])


def _adapter(patch: Record, name: str, config: Any) -> str:
    method = name_of(config.peft_type)
    if why_not_adapter(config) is not None:
        return f"{method}, left alone"
    runs = explain.backends(patch.host, name, operations(patch, name))
    tasks = patch.host.prompts[name].num_tasks
    size = f"{config.num_virtual_tokens} virtual tokens" + ("" if tasks is None else f" for each of {tasks} tasks")
    return ", ".join(filter(None, (method, size, runs, f"route {_route(patch, name)}")))


def operations(patch: Record, name: str) -> list[str]:
    """The ops that serve an adapter, in the order they run in."""
    config, encoder = patch.model.peft_config[name], patch.model.prompt_encoder[name]
    encodes = why_not_encoder(encoder, config) is None
    if patch.task is not None:
        return explain.operations(patch.host, name, encodes)
    return [*method_of(config).ops(encoder)] if encodes else []


def _route(patch: Record, name: str) -> str:
    if "forward" not in patch.replaced:
        return "PEFT's own"
    if patch.host.prompts[name].in_cache:
        return "prefix: its keys and values stand in the cache"
    if patch.route == SPLICE:
        return "splice (asked for)"
    objection = why_not_model(patch.host, name)
    if objection is not None:
        return f"splice ({objection})"
    return "shared" if patch.route == SHARED else "shared where it pays, else splice"


def _generate(patch: Record) -> str:
    if patch.fix:
        return f"this package's own, route {patch.route}"
    if patch.host.prompts[patch.host.in_use].in_cache:
        return "PEFT's own, with a prefix that all rows share"
    objection = why_not_generate(patch.host, {})
    if objection is not None:
        return f"PEFT's own, the prompt in each row ({objection})"
    return "PEFT's own, behind a prompt that is computed once and kept"


def _defects(patch: Record) -> list[str]:
    found = []
    for config in patch.model.peft_config.values():
        task, method = map(name_of, (config.task_type, config.peft_type))
        if why_not_adapter(config) is None:
            found += [defect for defect in DEFECTS if defect not in found and defect.concerns(task, method)]
    if not found:
        return []
    kept = [f"  {defect.what}" for defect in found if not (patch.fix and defect.fixed)]
    corrected = [f"  {defect.what}: {defect.fixed}" for defect in found if patch.fix and defect.fixed]
    lines = ["corrected:", *corrected] if corrected else []
    return [*lines, "PEFT's defects that remain:", *kept] if kept else lines
