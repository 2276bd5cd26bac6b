"""A deep ensemble: separately trained networks, each of which is one function; their mean is the plain one.

Source: Lakshminarayanan, Pritzel & Blundell, NeurIPS 2017, arXiv 1612.01474.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from forcedrop.dropout import DropoutSite
from forcedrop.potential import EnergyModel, Gradients, GraphInputs


class MemberChoice(DropoutSite):
    """Which member speaks: all, as their mean, or the one of a frozen function.

    Args:
        n: number of members.
    """

    bank: Tensor

    def __init__(self, n: int) -> None:
        super().__init__(0.0)
        self.register_buffer("bank", torch.arange(n), persistent=False)

    def check_samples(self, n: int) -> None:
        """Refuse more samples than there are members.

        Raises:
            ValueError: naming how many there are.
        """
        if n > len(self.bank):
            raise ValueError(f"a deep ensemble of {len(self.bank)} has no {n} functions")

    @property
    def active(self) -> bool:
        """Whether one member alone speaks."""
        return self._function is not None

    def forward(self, values: Tensor) -> Tensor:
        """Return the mean over the first axis, the members, or what one of them says, or each row's own one.

        Raises:
            ValueError: if there is no such member.
        """
        if self._function is None:
            return values.mean(0)
        sample = self._function.sample
        if isinstance(sample, int) and not 0 <= sample < len(values):
            raise ValueError(f"function {sample} of a deep ensemble of {len(values)}")
        chosen = torch.as_tensor(sample, device=values.device)
        return values[chosen] if chosen.dim() == 0 else values[chosen, torch.arange(values.shape[1])]


def _plain(member: EnergyModel) -> EnergyModel:
    """Return a copy of a network without functions of its own; what regression found for it stays."""
    made = deepcopy(member)
    weight = None if made.correction is None else made.correction.weight.clone()
    made.forget_functions()
    if weight is not None:
        made.set_functions(weight, None)
    return made


class Ensemble(EnergyModel):
    """Several networks as one; a network's own functions are not looked at, its plain energies are.

    Args:
        members: at least two, of the same elements and cutoff.

    Raises:
        ValueError: if there are fewer than two, or elements or cutoffs differ.
    """

    kind = "ensemble"

    def __init__(self, members: Sequence[EnergyModel]) -> None:
        if len(members) < 2:
            raise ValueError(f"an ensemble needs at least two models, got {len(members)}")
        for name in ("elements", "cutoff", "dtype"):
            values = [getattr(member, name) for member in members]
            if len(set(values)) > 1:
                raise ValueError(f"the models of an ensemble must have the same {name}, got {values}")
        members = [_plain(member) for member in members]
        first = members[0]
        super().__init__(first.shape, first.elements)
        self.repulsion = self.presence = None  # members have their own
        self.approach.to(first.dtype)
        self.energy_scale = torch.ones_like(first.energy_scale)  # as are their units
        self.isolated = torch.stack([member.isolated for member in members]).mean(0)
        self.members = nn.ModuleList(members)
        self.choice = MemberChoice(len(members))

    @property
    def offsets(self) -> Tensor:
        """How far the isolated-atom energies of each member are from their mean [eV], shape (members, elements)."""
        return torch.stack([member.isolated for member in self.each()]) - self.isolated

    def each(self) -> list[EnergyModel]:
        """Return the members."""
        members: Any = self.members
        return list(members)

    def forward(self, vec: Tensor, graph: GraphInputs) -> Tensor:
        """Return the energy of every atom above its isolated energy [eV], the members' mean or that of the frozen one."""
        offsets = self.offsets
        energies = [m(vec, graph) + o[graph.species].to(vec.dtype) for m, o in zip(self.each(), offsets, strict=True)]
        chosen: Tensor = self.choice(torch.stack(energies))
        return chosen

    def gradients(self, vec: Tensor, graph: GraphInputs) -> Gradients:
        """Return energies and gradients, each member by its own way back."""
        if self.choice.active:
            return super().gradients(vec, graph)
        found = self.function_gradients(vec, graph, torch.arange(len(self.members)))
        return Gradients(found.energies.mean(0), found.gradient.mean(0))

    def function_gradients(self, vec: Tensor, graph: GraphInputs, samples: Tensor, seed: int = 0) -> Gradients:
        """Return those of some members."""
        offsets = self.offsets
        members, found = self.each(), []
        for k in samples.tolist():
            energies, gradient = members[k].gradients(vec, graph)
            found.append(Gradients(energies + offsets[k][graph.species].to(vec.dtype), gradient))
        return Gradients(*(torch.stack(x) for x in zip(*found, strict=True)))

    def bytes_per_function(self, n_atoms: int, n_slots: int) -> float:
        """Estimate what a member takes."""
        return self.each()[0].bytes_per_function(n_atoms, n_slots)
