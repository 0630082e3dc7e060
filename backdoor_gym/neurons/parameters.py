"""What a record computes from parameters alone, and where zeros written into a parameter arrive."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .recording import Named, Ref, Tape, Value, leaves


class Parameters:
    """The parameters of a network, and the values of a record that depend on nothing else.

    Attributes:
        tensors: parameters and buffers by name.
        constant: for each call so far, whether it gives the same for all images.
    """

    def __init__(self, tensors: Mapping[str, Tensor], tape: Tape) -> None:
        self.tensors, self._tape = tensors, tape
        self.constant: list[bool] = []

    def value(self, argument: Any) -> Tensor | None:
        """The tensor that an argument is in every pass, None where it is another in each."""
        if isinstance(argument, Named):
            return self.tensors[argument.name]
        if isinstance(argument, Value):
            return argument.tensor
        if isinstance(argument, Ref) and argument.call >= 0 and self.constant[argument.call]:
            return self._tape.result(argument)
        return None

    def read(self, argument: Any) -> list[str]:
        """The names of the parameters that a constant argument is, or is computed from."""
        names: dict[str, None] = {}
        front, seen = [argument], set()
        while front:
            value = front.pop()
            if isinstance(value, Named):
                names[value.name] = None
            elif isinstance(value, Ref) and value.call >= 0 and value not in seen:
                seen.add(value)
                call = self._tape.calls[value.call]
                front += leaves((call.args, call.kwargs))
        return list(names)

    def written(self, argument: Any) -> tuple[tuple[str, int], ...] | None:
        """The parameters to write zeros into, so that single rows of a constant argument become zero.

        Each comes with the row of the argument that its first row makes: a value may be put together of several parameters.
        Empty for None; None where no zeros can be written, or where they would change other rows.
        """
        if isinstance(argument, Named):
            return ((argument.name, 0),)
        if argument is None:
            return ()
        whole = self.value(argument)
        if whole is None or not isinstance(argument, Ref):
            return None
        makers: list[tuple[str, int]] = []
        left = _rows_with_values(whole)
        for name in sorted(self.read(argument), key=lambda name: -self.tensors[name].numel()):
            first = self._first_row(argument, whole, name)
            rows = slice(first, None if first is None else first + len(self.tensors[name]))
            if first is not None and left[rows].any():
                makers.append((name, first))
                left[rows] = False
        return None if left.any() else tuple(makers)

    def _first_row(self, argument: Ref, whole: Tensor, name: str) -> int | None:
        """The row of a value that the first row of a parameter makes, if each makes the next one; else None.

        For each bit, zeros go into all rows whose number has it: it is in the number of the rows that become zero, too.
        """
        parameter = self.tensors[name]
        if not parameter.ndim or not 0 < len(parameter) <= len(whole):
            return None
        reached = self._zeroed(argument, whole, {name: torch.zeros_like(parameter)})
        if reached is None or not reached.any():
            return None
        numbers = torch.zeros(len(whole), dtype=torch.int64)
        own = torch.arange(len(parameter))
        for bit in range((len(parameter) - 1).bit_length()):
            pruned = parameter.clone()
            pruned[(own >> bit) % 2 == 1] = 0
            rows = self._zeroed(argument, whole, {name: pruned})
            if rows is None:
                return None
            numbers[rows] += 1 << bit
        places = torch.nonzero(reached).flatten()
        firsts = (places - numbers[places]).unique()
        first = int(firsts[0])
        return first if len(firsts) == 1 and 0 <= first <= len(whole) - len(parameter) else None

    def _zeroed(self, argument: Ref, whole: Tensor, instead: Mapping[str, Tensor]) -> Tensor | None:
        """The rows that become zero with other parameters, bool (rows,); None where rows become something else."""
        changed = self._computed(argument, instead)
        differs = (changed != whole).flatten(1).any(1) if whole.ndim > 1 else changed != whole
        gone = ~_rows_with_values(changed)
        return None if (differs & ~gone).any() else differs & gone

    def _computed(self, argument: Any, instead: Mapping[str, Tensor]) -> Any:
        """A constant argument, computed from other parameters."""
        if isinstance(argument, Named):
            return instead.get(argument.name, self.tensors[argument.name])
        if isinstance(argument, Value):
            return argument.tensor
        if not isinstance(argument, Ref):
            return argument
        call = self._tape.calls[argument.call]
        args, kwargs = fx.node.map_aggregate((call.args, call.kwargs), lambda value: self._computed(value, instead))
        function, args = (getattr(args[0], call.target), args[1:]) if call.op == "call_method" else (call.target, args)
        result = function(*args, **kwargs)
        return result if argument.part is None else result[argument.part]


def _rows_with_values(tensor: Tensor) -> Tensor:
    """The rows that are not all zeros, bool (rows,); what is not a number is a value."""
    return (tensor != 0).flatten(1).any(1) if tensor.ndim > 1 else tensor != 0
