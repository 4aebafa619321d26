"""The loops of a machine program, found in its control flow.

A branch that goes back is not yet a loop: the compiler moves waiting on a barrier behind the end of
the program, from where it jumps back into the middle. A loop is what returns to a block that every
way to it has passed (a natural loop).
"""

from collections import defaultdict
from dataclasses import dataclass

ENDS = ("EXIT", "RET")  # after these, unless predicated, nothing follows


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: where it stands, what it does, and when.

    Attributes:
        address: bytes from the start of its function.
        opcode: with its modifiers, as HGMMA.64x64x16.F32.BF16.
        conditional: whether it may be passed over.
        never: whether it always is: the compiler fills slots so.
        target: the address it may branch to.
    """

    address: int
    opcode: str
    conditional: bool = False
    never: bool = False
    target: int | None = None

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Every loop of one function in the order of its first instruction; nested ones are repeated.

    Loops that begin at the same instruction count as one. Subroutines are not part of a loop.
    """
    blocks = _blocks(code)
    successors = {start: _successors(body, blocks) for start, body in blocks.items()}
    order = _reverse_postorder(code[0].address, successors) if code else []
    predecessors = defaultdict(list)
    for block in order:
        for successor in successors[block]:
            predecessors[successor].append(block)
    dominators = _dominators(order, predecessors)
    bodies: dict[int, set[int]] = {}
    for block in order:
        for head in successors[block]:
            if head in dominators[block]:
                body = bodies.setdefault(head, {head})
                pending = [block]
                while pending:
                    member = pending.pop()
                    if member not in body:
                        body.add(member)
                        pending += predecessors[member]
    return [
        [instruction for block in sorted(body) for instruction in blocks[block]]
        for _, body in sorted(bodies.items())
    ]


def _blocks(code: list[Instruction]) -> dict[int, list[Instruction]]:
    starts = {instruction.target for instruction in code}
    blocks: dict[int, list[Instruction]] = {}
    current: list[Instruction] = []
    new = True
    for instruction in code:
        if new or instruction.address in starts:
            current = blocks.setdefault(instruction.address, [])
        current.append(instruction)
        new = instruction.target is not None or instruction.name in ENDS
    return blocks


def _successors(body: list[Instruction], blocks: dict[int, list[Instruction]]) -> list[int]:
    last = body[-1]
    found = [] if last.target is None else [last.target]
    goes_on = last.conditional or (last.target is None and last.name not in ENDS)
    if goes_on:
        found += [start for start in blocks if start > last.address][:1]  # in order of address
    return found


def _reverse_postorder(entry: int, successors: dict[int, list[int]]) -> list[int]:
    finished: list[int] = []
    seen = {entry}
    stack = [(entry, iter(successors[entry]))]
    while stack:
        block, rest = stack[-1]
        following = next((s for s in rest if s not in seen), None)
        if following is None:
            finished.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    return finished[::-1]


def _dominators(order: list[int], predecessors: dict[int, list[int]]) -> dict[int, set[int]]:
    """For each block, the blocks that every way from the entry to it passes, itself included."""
    found = {block: set(order) for block in order}
    changed = True
    while changed:
        changed = False
        for block in order:
            before = [found[p] for p in predecessors[block]] if block != order[0] else []
            now = {block} | (set.intersection(*before) if before else set())
            changed |= now != found[block]
            found[block] = now
    return found
