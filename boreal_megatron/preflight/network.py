"""Collectives between ranks: every number that arrives is known beforehand, so a wrong one names who sent it.

Each of the run's groups is tried, and the world; those with the same ranks once. n ranks in a group.
"""

import torch
import torch.distributed as dist

from boreal_megatron.preflight.finding import Finding
from boreal_megatron.preflight.speed import held, seconds

# Shares of one link's figure (NVLink within a host, the GPU's network adapter between hosts) from which on a rate
# passes. Rates are nccl-tests' bus bandwidths. Not measured by us on GPUs.
FRACTIONS = {"all-reduce": 0.5, "all-to-all": 0.4, "point to point": 0.4}
BYTES = {"cuda": 256 << 20, "cpu": 1 << 20}
AXES = {"tensor": "tp", "context": "cp", "expert": "ep", "pipeline": "pp", "data": "dp_cp"}


def exchanges(here):
    """The findings of this rank over all its groups."""
    groups, seen, found = {"world": dist.group.WORLD}, [], []
    groups |= {axis: getattr(here.mesh.groups, name) for axis, name in AXES.items()}
    for axis, group in groups.items():
        ranks = dist.get_process_group_ranks(group)
        if len(ranks) == 1 or ranks in seen:
            continue
        seen.append(ranks)
        for name, function in (("all-reduce", all_reduce), ("all-to-all", all_to_all), ("point to point", ring)):
            wrong, call, moved = function(here, group, ranks)
            found += [right(f"{name} over {axis}", wrong), rate(here, f"{name} over {axis}", ranks, call, moved)]
    return found or [Finding("collectives", None, "one rank: nothing to exchange")]


def all_reduce(here, group, ranks):
    """(what arrived wrong, the exchange again, bytes that one link moves in it), as the two below."""
    x = torch.empty(elements(here, ranks), device=here.mesh.device)
    steps = torch.arange(x.numel(), device=x.device)
    wanted = sum((steps + rank) % 13 for rank in ranks).float()  # small whole numbers: no order of summation matters
    x.copy_((steps + here.mesh.rank) % 13)
    dist.all_reduce(x, group=group)
    wrong = int((x != wanted).sum())
    again = torch.zeros_like(x)  # what is summed over and over must stay finite
    moved = 2 * (len(ranks) - 1) / len(ranks) * x.nbytes
    return f"{wrong} wrong numbers" if wrong else "", lambda: dist.all_reduce(again, group=group), moved


def all_to_all(here, group, ranks):
    me, each = here.mesh.rank, elements(here, ranks) // len(ranks)
    sent = torch.cat([letter(me, to, each, here) for to in ranks])
    got = torch.empty_like(sent)

    def exchange():
        dist.all_to_all_single(got, sent, group=group)

    exchange()
    parts = zip(ranks, got.split(each), strict=True)
    wrong = senders(here, {rank: (part, letter(rank, me, each, here)) for rank, part in parts})
    return wrong, exchange, (len(ranks) - 1) / len(ranks) * sent.nbytes


def ring(here, group, ranks):
    """To the next rank, from the one before."""
    me, place = here.mesh.rank, ranks.index(here.mesh.rank)
    after, before = ranks[(place + 1) % len(ranks)], ranks[place - 1]
    sent = letter(me, after, elements(here, ranks), here)
    got = torch.empty_like(sent)

    def exchange():
        calls = [dist.P2POp(dist.isend, sent, after, group), dist.P2POp(dist.irecv, got, before, group)]
        for request in dist.batch_isend_irecv(calls):
            request.wait()

    exchange()
    return senders(here, {before: (got, letter(before, me, got.numel(), here))}), exchange, sent.nbytes


def elements(here, ranks):
    """FP32 numbers of one exchange, a multiple of the group's size."""
    return BYTES[here.mesh.device.type] // 4 // len(ranks) * len(ranks)


def letter(source, target, count, here):
    """What `source` sends to `target`."""
    return ((torch.arange(count, device=here.mesh.device) + 131 * source + 17 * target) % 251).float()


def senders(here, parts):
    """Whose numbers arrived wrong: {rank: (found, wanted)} to a line, empty where all are right."""
    wrong = {rank: int((found != wanted).sum()) for rank, (found, wanted) in parts.items()}
    return ", ".join(f"{n} wrong numbers from rank {rank} ({here.hosts[rank]})" for rank, n in wrong.items() if n)


def right(name, wrong):
    advice = (
        "the sender, the receiver or the link between them corrupts data: leave them out one at a time" if wrong else ""
    )
    return Finding(f"{name}: numbers", not wrong, wrong or "as sent", "as sent", advice)


def rate(here, name, ranks, call, moved):
    """GB/s of the fastest sample; all ranks take the same number of samples."""
    gigabytes = moved / seconds(call) / 1e9
    one_host = len({here.hosts[rank] for rank in ranks}) == 1
    link = here.gpu and (here.gpu.nvlink if one_host else here.gpu.nic)
    return held(name, gigabytes, "GB/s", link, FRACTIONS)
