"""A plan, carried out: `run`."""

from __future__ import annotations

from typing import Any

from ..ops._backend import AUTO
from .call import BASE, CONTINUE, SHARED, Plan
from .choice import RouteUnavailable
from .generate import run_generate
from .host import Host
from .plan import plan as plan_again
from .shared import run_shared
from .splice import run_spliced


def run(host: Host, plan: Plan) -> Any:
    """The output of the call that was planned.

    Where the base model turns out to have a cache that cannot be shared, and `auto` was asked for, the call is planned
    and run once more.

    Raises:
        RouteUnavailable: the same, where "shared" was asked for.
    """
    names = plan.mixture.names if plan.mixture is not None else None
    try:
        with host.heads_for_rows(names):
            if plan.call.generates:
                return run_generate(host, plan)
            if plan.route in (BASE, CONTINUE):
                return host.base_model(**plan.fields.given(), **plan.others)
            return (run_shared if plan.route == SHARED else run_spliced)(host, plan)
    except RouteUnavailable:
        if plan.route != SHARED or plan.call.route != AUTO:
            raise
    return run(host, plan_again(host, plan.call, plan.placement))
