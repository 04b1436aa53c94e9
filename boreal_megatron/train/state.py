"""What a run remembers besides weights and moments, and the digest that proves a resume."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from boreal_megatron import platform
from boreal_megatron.data.sampler import Ledger
from boreal_megatron.errors import ProblemsError
from boreal_megatron.train import optim


@dataclass(frozen=True)
class State:
    """Steps taken, the data ledger, and the fingerprints of the sources that the ledger's cursors point into.
    Positions and raw tokens are counted by the ledger."""

    step: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    sources: dict[str, str] = field(default_factory=dict)
    entered: tuple[int, int] = (0, 0)  # (steps, raw tokens) when the present phase began

    @property
    def now(self):
        return self.step, self.ledger.raw_tokens

    def to_dict(self):
        return {
            "step": self.step,
            "ledger": self.ledger.to_dict(),
            "sources": self.sources,
            "entered": list(self.entered),
        }

    @classmethod
    def from_dict(cls, values):
        return cls(values["step"], Ledger.from_dict(values["ledger"]), values["sources"], tuple(values["entered"]))

    def continue_on(self, fingerprints):
        """The state with the sources that the run has now.

        Raises:
            ProblemsError: a source of the same name holds other data, or is cut otherwise, than its cursor is for.
        """
        changed = [
            f"data.sources.{name}: its files, weights or bins, data.piece_tokens or the seed changed since the "
            "checkpoint; restore them, or give the new data a new name"
            for name, fingerprint in fingerprints.items()
            if self.sources.get(name, fingerprint) != fingerprint
        ]
        if changed:
            raise ProblemsError("resuming", changed)
        return dataclasses.replace(self, sources={**self.sources, **fingerprints})


def digest(chunks, optimizer, state):
    """SHA-256 of everything a resume must bring back, over all ranks.

    Returns:
        dict of hex digests: parameters (and buffers), moments (and master weights), rng, ledger.
    """
    tensors = {
        f"{number}.{name}": tensor
        for number, chunk in enumerate(chunks)
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]
    }
    moments = {}
    for number, part in enumerate(optim.parts(optimizer)):
        for position, (parameter, values) in enumerate(part.optimizer.state.items()):
            if torch.is_tensor(parameter):
                moments[f"{number}.{position}.master"] = parameter
            moments |= {f"{number}.{position}.{key}": value for key, value in values.items()}
    local = {
        "parameters": _hash(tensors),
        "moments": _hash(moments),
        "rng": _hash(platform.current().rng_state()),
    }
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, local)
    joined = {key: hashlib.sha256("".join(rank[key] for rank in everyone).encode()).hexdigest() for key in local}
    joined["ledger"] = hashlib.sha256(json.dumps(state.to_dict(), sort_keys=True).encode()).hexdigest()
    return joined


def _hash(tensors):
    out = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        value = value.detach() if torch.is_tensor(value) else torch.tensor(value)
        out.update(f"{name}:{tuple(value.shape)}:{value.dtype}".encode())
        out.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()
