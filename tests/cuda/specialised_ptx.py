"""A kernel's PTX as the kernel of one launch, for tools that want arguments fixed.

A struct among the parameters becomes one parameter a field, and what the arguments decide (a
pointer's alignment, a count that lies in device memory) becomes its value. All else stays the
compiler's.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

from launches import Launch

# Whatever is larger is an address and no size.
ADDRESS = 1 << 32
FORMATS = {
    **{"u8": "<B", "b8": "<B", "s8": "<b", "u16": "<H", "b16": "<H", "u32": "<I", "b32": "<I"},
    **{"s32": "<i", "u64": "<Q", "b64": "<Q", "s64": "<q", "f32": "<f", "f64": "<d"},
}
OPERATIONS: dict[str, Callable[..., int]] = {
    **{"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b},
    **{"and": lambda a, b: a & b, "or": lambda a, b: a | b, "mad": lambda a, b, c: a * b + c},
    **{"shl": lambda a, b: a << b, "shr": lambda a, b: a >> b, "mov": lambda a: a},
    **{"cvt": lambda a: a, "cvta": lambda a: a, "selp": lambda a, b, c: a if c else b},
    **{"setp.eq": lambda a, b: int(a == b), "setp.ne": lambda a, b: int(a != b)},
}
ALIGNMENT_MASKS = (1, 3, 7, 15)
SOURCE = "// csrc/cuda/"


def entries(ptx: str) -> dict[str, str]:
    """Each kernel of a PTX file as a module of its own, by mangled name; lines of csrc/cuda that
    instructions are of are comments."""
    files = dict(re.findall(r'(?m)^\s*\.file\s+(\d+) "[^"]*/cuda/([\w.]+)"', ptx))

    def comment(line: re.Match[str]) -> str:
        """The innermost place of those it was inlined at."""
        places = re.findall(r"(?:\.loc\s+|inlined_at )(\d+) (\d+)", line[0])
        own = [f"{SOURCE}{files[file]}:{at}\n" for file, at in places if file in files]
        return own[0] if own else ""

    text = re.sub(r"(?m)^\s*\.loc\b.*\n", comment, re.split(r"\n\s*\.section\s+\.debug", ptx)[0])
    text = re.sub(r"(?m)^\s*\.file\b.*\n", "", text)
    head, *parts = re.split(r"(?m)^(?=\s*(?:\.visible |\.weak )?\.(?:entry|func)\b)", text)
    named = {name[1]: part for part in parts if (name := re.search(r"\.entry\s+(\w+)\(", part))}
    return {name: head + part for name, part in named.items()}


def source_line(text: str, line: int) -> str:
    """The line of csrc/cuda that a line (from 1) of such a module is of."""
    above = [x for x in text.split("\n")[:line] if x.startswith(SOURCE)]
    return above[-1].removeprefix(SOURCE) if above else "no line"


class Specialised:
    """A kernel's PTX with the arguments of a launch: the module, and sentryward's input."""

    def __init__(self, ptx: str, launch: Launch) -> None:
        self.text = ptx
        self.arguments: list[dict[str, Any]] = []
        name = re.search(r"\.entry\s+(\w+)\(", ptx)
        assert name is not None
        self.prefix = name[1] + "_param_"
        self.values: dict[str, int] = {}
        for index, value in enumerate(launch.arguments):
            self._parameter(f"{self.prefix}{index}", value)
        self.text = Folding(self.text, self.values, launch.memory).text
        self.input = {
            "schema": "spverify.kernel-input/v1",
            "launch": {
                "grid_dim": list(launch.grid),
                "block_dim": [launch.threads, 1, 1],
                "cluster_dim": [1, 1, 1],
                "dynamic_shared_bytes": launch.shared,
            },
            "arguments": self.arguments,
        }

    def _parameter(self, name: str, value: bytes) -> None:
        is_struct = re.search(rf"\.param \.align \d+ \.b8 {name}\[\d+\]", self.text)
        if not is_struct:
            kind = re.search(rf"\.param \.(\w+)[^\n]*? {name}\b", self.text)
            assert kind is not None
            self._argument(name, kind[1], value)
            return
        fields = self._fields(name)
        declared = [f".param .{kind} {name}_{at}" for at, kind in sorted(fields.items())]
        self.text = re.sub(
            rf"\.param \.align \d+ \.b8 {name}\[\d+\]",
            ",\n".join(declared) or f".param .u32 {name}_unused",
            self.text,
        )
        for at, kind in fields.items():
            self._argument(f"{name}_{at}", kind, value[at:])
        if not fields:
            self._argument(f"{name}_unused", "u32", bytes(4))

    def _fields(self, name: str) -> dict[int, str]:
        """Gives every field that is loaded a name of its own; their types by offset."""
        fields: dict[int, str] = {}
        aliases, rest = [], [name]
        while rest:
            copies = re.findall(rf"mov\.[bu]64\s+(%\w+), {rest.pop()};", self.text)
            aliases += copies
            rest += copies

        def rename(load: re.Match[str]) -> str:
            kind, first = load[1], int(load[4] or 0)
            lines = []
            for i, register in enumerate(load[2].strip("{}").split(",")):
                at = first + i * struct.calcsize(FORMATS[kind])
                fields.setdefault(at, kind)
                lines.append(f"ld.param.{kind} {register.strip()}, [{name}_{at}];")
            return "\n".join(lines)

        source = "|".join([name, *aliases])
        self.text = re.sub(
            rf"ld\.param(?:\.v[24])?\.(\w+)\s+(\{{[^}}]*\}}|%\w+), \[({source})(?:\+(\d+))?\];",
            rename,
            self.text,
        )
        return fields

    def _argument(self, name: str, kind: str, value: bytes) -> None:
        number = struct.unpack_from(FORMATS[kind], value)[0]
        self.values[name] = number
        if kind not in ("u64", "b64") or 0 < number < ADDRESS:
            kind = kind.replace("b", "u")
            self.arguments.append({"parameter": name, "type": kind, "value": number})
            return
        # A zero may be a size as well as no address: it is the same to the kernel.
        pointer = f".param .u64 .ptr .global .align 16 {name}"
        self.text = re.sub(rf"\.param \.{kind}[^\n,]*? {name}\b", pointer, self.text, count=1)
        if number == 0:
            self.arguments.append({"parameter": name, "type": "pointer", "value": None})


class Folding:
    """Replaces what follows from arguments alone: alignment tests, and counts in device memory."""

    def __init__(self, text: str, parameters: dict[str, int], memory: dict[int, bytes]) -> None:
        self.parameters, self.memory = parameters, memory
        pattern = r"^[ \t]*([a-z][\w.]*)[ \t]+(%\w+), ([^;{}]*);$"
        self.known: dict[str, int] = {}
        written = re.findall(r"(?m)^[ \t]*(?:@!?%p\d+ )?[a-z][\w.]*[ \t]+(%\w+),", text)
        once = {register for register, times in Counter(written).items() if times == 1}
        lines = []
        for line in text.split("\n"):
            found = re.match(pattern, line)
            if found and found[2] in once:
                line = self._folded(line, *found.groups())  # noqa: PLW2901
            lines.append(line)
        self.text = "\n".join(lines)

    def _folded(self, line: str, opcode: str, target: str, rest: str) -> str:
        """The line, or its constant; registers come before their uses."""
        if opcode.startswith("ld."):
            place = re.fullmatch(r"\[([%\w]+)(?:\+(\d+))?\]", rest)
            if not place or not opcode.endswith(("64", "32", "8")) or ".f" in opcode:
                return line
            at = int(place[2] or 0)
            if opcode.startswith("ld.param") and isinstance(self.parameters.get(place[1]), int):
                self.known[target] = self.parameters[place[1]]
            elif (
                opcode.startswith("ld.global") and opcode.endswith("64") and place[1] in self.known
            ):
                bytes_there = self.memory.get(self.known[place[1]], b"")[at : at + 8]
                if len(bytes_there) == 8:
                    self.known[target] = struct.unpack("<q", bytes_there)[0]
                    return f"mov.b64 {target}, {self.known[target]};"
            return line
        operands = [self._value(operand.strip()) for operand in rest.split(",")]
        name = ".".join(opcode.split(".")[: 2 if opcode.startswith("setp") else 1])
        operation = OPERATIONS.get(name)
        if operation is None or None in operands or ".f" in opcode or ".hi" in opcode:
            return line
        try:
            self.known[target] = operation(*operands) & (2**64 - 1)
        except TypeError:  # more operands than the operation is known with
            return line
        if name == "and" and operands[1] in ALIGNMENT_MASKS:
            return f"mov.{opcode.split('.')[1]} {target}, {self.known[target]};"
        return line

    def _value(self, operand: str) -> int | None:
        return int(operand) if re.fullmatch(r"-?\d+", operand) else self.known.get(operand)
