"""What machine code does before the kernel in front of it has ended, read from a disassembly (SASS)."""

from __future__ import annotations

import re

# `/*01c0*/ @!P0 LDG.E.128 R4, [R2] ;`
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)([^;]*);")
# Accesses to global memory, by whatever unit. CCTL.E.PF2 is none of them, a prefetch to L2: what is written later
# replaces the line there.
_GLOBAL = re.compile(
    r"(LD|ST|LDG|STG|LDGSTS|ATOM|ATOMG|RED|REDG|CCTL|UBLK\w+|UTMA\w+|SULD|SUST|SUATOM|SURED|TEX|TLD\d?)$"
)
# What could lead elsewhere than to the next instruction, but for BRA, which says where to.
_LEAVES = re.compile(r"(BRX|BRXU|JMP|JMX|JMXU|CALL|RET|EXIT|BREAK|KILL|RTT)$")
_WAIT, _LET_START = "ACQBULK", "PREEXIT"


def why_too_early(disassembly: str) -> str | None:
    """What is wrong with a kernel that may start before the one in front of it has ended; None if nothing is.

    It must wait (`griddepcontrol.wait`, ACQBULK) before it touches global memory, but for prefetches to L2, and let the
    next one start (`griddepcontrol.launch_dependents`, PREEXIT) only after that. No way may lead around the wait: then
    what stands behind it comes later, and only what stands before it may come earlier.
    """
    code = [(int(place, 16), *rest) for place, *rest in _INSTRUCTION.findall(disassembly)]
    waits = [place for place, predicate, name, *_ in code if name == _WAIT and not predicate]
    if not waits:
        return "never waits"
    for place, _, name, modifiers, operands in code:
        if place >= waits[0]:
            break
        around = name == "BRA" and int(operands.split()[-1], 16) > waits[0]
        access = _GLOBAL.match(name) and not (name == "CCTL" and ".PF2" in modifiers)
        leaves = _LEAVES.match(name) and not (name == "CALL" and _returns_at_once(code, operands))
        if around or access or leaves or name == _LET_START:
            return f"{name}{modifiers} {'around' if around else 'before'} the wait"
    return None if any(name == _LET_START for _, _, name, *_ in code) else "lets none start early"


def _returns_at_once(code: list[tuple[int, str, str, str, str]], operands: str) -> bool:
    """Whether a call leads to a few instructions that touch no global memory and return: the guard of tensor memory's
    allocation that ptxas puts in on sm_100 (a trap)."""
    target = re.search(r"0x([0-9a-f]+)", operands)
    if target is None:
        return False
    for place, _, name, *_ in code:
        if place >= int(target[1], 16):
            if name == "RET":
                return True
            if _GLOBAL.match(name) or _LEAVES.match(name) or name in ("BRA", _WAIT, _LET_START):
                return False
    return False
