"""Figures of a compiled program: memory, FLOPs, estimated cycles, collectives."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

_COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_RAGGED = "ragged-all-to-all"


class CompiledCost(NamedTuple):
    """Figures of one device's part of a compiled program."""

    temp_bytes: int  # the compiler's scratch: activations, residuals
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # outputs stored in donated arguments
    flops: float  # counts bodies of loops once and Pallas calls not at all
    bytes_accessed: float  # likewise
    cycles: int  # TPU: the compiler's estimates over the schedule, with trip counts; else 0
    collectives: dict[str, int]  # kind -> instructions
    # Traffic between TPU slices, over the slower network, has the kind "between slices".
    exchanged: dict[
        str, tuple[int, int]
    ]  # kind -> (calls, bytes that a device receives), with trip counts of loops
    kernels: int  # Pallas calls

    @property
    def peak_bytes(self) -> int:
        """Arguments, temporaries, and outputs that are not stored in arguments."""
        return self.argument_bytes + self.temp_bytes + self.output_bytes - self.alias_bytes


def compiled_cost(compiled: jax.stages.Compiled) -> CompiledCost:
    """The figures of `jax.jit(f).lower(...).compile()`.

    The TPU compiler writes its own estimate of cycles on each fusion of the final schedule. It can
    compare two programs but is not a time; it excludes Pallas calls and collectives.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    cost: dict[str, Any] = compiled.cost_analysis() or {}
    return CompiledCost(
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        flops=cost.get("flops", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        cycles=estimated_cycles(text),
        collectives=dict(collections.Counter(re.findall(rf" ({_COLLECTIVES})(?:-start)?\(", text))),
        exchanged=exchanged_bytes(text),
        kernels=len(
            re.findall(r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton)"', text)
        ),
    )


def estimated_cycles(text: str) -> int:
    """Sum of `estimated_cycles` over a scheduled HLO text, a loop's body times its trip count."""
    total = 0
    for line, times in _executed(text):
        match = re.search(r'"estimated_cycles":"(\d+)"', line)
        if match and int(match[1]) < 1 << 40:  # the compiler's "unknown" is larger
            total += times * int(match[1])
    return total


def exchanged_bytes(text: str) -> dict[str, tuple[int, int]]:
    """Kind of collective -> (calls, bytes) of one run of a compiled HLO text, for one device.

    The bytes are those of the results of an all-gather, a reduce-scatter or an all-to-all, with the
    device's own share. An all-reduce counts twice, because it is a reduce-scatter and an all-gather. A
    ragged all-to-all counts as the smaller of its operand and its result: the other has room for the rows
    of all devices.
    """
    found: dict[str, list[int]] = {}
    sizes = _array_sizes(text) if _RAGGED in text else {}
    for line, times in _executed(text):
        if match := re.search(r"= \((\w+)\[([\d,]*)\].* recv\(.*xla_megascale", line):
            calls = found.setdefault("between slices", [0, 0])
            calls[0] += times
            calls[1] += times * _size(match[1], match[2])
            continue
        if match := re.search(rf"= \(?(\w+)\[([\d,]*)\].* {_RAGGED}\(.*?%?([\w.\-]+)[,)]", line):
            calls = found.setdefault(_RAGGED, [0, 0])
            calls[0] += times
            calls[1] += times * min(_size(match[1], match[2]), sizes[match[3]])
            continue
        # Of a collective in two halves only "-done" has just the result. XLA:TPU reduce-scatters in
        # a fusion.
        match = re.search(rf"= (.*?) ({_COLLECTIVES})(-done)?\(", line) or re.search(
            r"= (.*?) fusion\(.*calls=%?all-reduce-(scatter)\b", line
        )
        if not match:
            continue
        kind = "reduce-scatter" if match[2] == "scatter" else match[2]
        size = sum(
            _size(*shape) for shape in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", match[1])
        )
        calls = found.setdefault(kind, [0, 0])
        calls[0] += times
        calls[1] += times * size * (2 if kind == "all-reduce" else 1)
    return {kind: (calls, size) for kind, (calls, size) in found.items()}


def _array_sizes(text):
    """{instruction: bytes of its result, or of the first of several}"""
    shapes = re.findall(r"^ +(?:ROOT )?%?([\w.\-]+) = \(?(\w+)\[([\d,]*)\]", text, re.MULTILINE)
    return {name: _size(dtype, sizes) for name, dtype, sizes in shapes if dtype != "token"}


def _size(dtype, dimensions):
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8


def _executed(text: str) -> Iterator[tuple[str, int]]:
    """The instructions of the entry and of computations that it calls, each with its execution count.

    XLA:TPU computes while it gathers: such a collective is in the fusion that starts it, and again in each
    fusion that computes beside it, which may lie in other loops. It is yielded where it starts.
    """
    lines, current, entry = collections.defaultdict(list), None, None
    for line in text.splitlines():
        if match := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            current = match[2]
            entry = current if match[1] else entry
        elif line.startswith("  ") and current:
            lines[current].append(line)

    def stride(condition, body):
        """The increment of a loop's counter, above 1 if the loop is unrolled."""
        counter = re.search(
            r"\b[su]32\[\]\S* get-tuple-element\(.*index=(\d+)", "\n".join(lines[condition])
        )
        root = re.search(r"ROOT .* tuple\((.*?)\)", "\n".join(lines[body]))
        if not counter or not root:
            return 1
        name = root[1].split(", ")[int(counter[1])]
        added = re.search(rf"{re.escape(name)} = .* add\((.*?)\)", "\n".join(lines[body]))
        for part in added[1].split(", ") if added else ():
            if one := re.search(
                rf"{re.escape(part)} = .* constant\((\d+)\)", "\n".join(lines[body])
            ):
                return int(one[1])
        return 1

    def trips(line, condition, body):
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
            return int(known[1])
        found = [re.findall(r"[su]32\[\]\S* constant\((\d+)\)", ln) for ln in lines[condition]]
        bound = max((int(x) for row in found for x in row), default=1)
        return -(-bound // stride(condition, body))

    def walk(name, times):
        for line in lines[name]:
            yield line, times
            if begun := re.match(
                r" +%?async-collective-start\S* = .* fusion\(.*calls=%?([\w.\-]+)", line
            ):
                inside = (x for x in lines[begun[1]] if re.search(rf" (?:{_COLLECTIVES})\(", x))
                yield from ((inner, times) for inner in inside)
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                yield from walk(loop[2], times * trips(line, *loop.groups()))
            # Asynchronous collectives are calls of separate computations.
            elif call := re.search(
                r" (?:async-start|call)\(.*(?:calls|to_apply)=%?([\w.\-]+)", line
            ):
                yield from walk(call[1], times)

    return walk(entry, 1) if entry else iter(())
