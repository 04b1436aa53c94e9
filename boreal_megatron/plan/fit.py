"""What a plan of memory says: whether a run fits, the table, and the nearest changes of the run that do fit."""

from boreal_megatron.config.check import problems
from boreal_megatron.plan import memory
from boreal_megatron.plan.memory import GIB

SHOWN, DEEP = 3, 3
PARTS = ("weights", "gradients", "optimizer")
SUMS = ("peak", "buffers", "reserved", "total")
ASSUMED = ("reserved", "total")


def answer(config, world, gpu, name, imbalance=memory.IMBALANCE):
    """What `boreal plan memory` prints, for programs: `memory.per_rank` with `gpu`, `memory`, `left` (bytes on the
    fullest rank, negative where it does not fit) and, there, `nearest`: {"change": {field: value}, "left"} of each."""
    found = memory.per_rank(config, world, imbalance=imbalance)
    offered = int(gpu.memory_gib * GIB)
    left = offered - memory.needed(found)
    changes = nearest(config, world, offered, imbalance) if left < 0 else []
    return found | {"gpu": name, "memory": offered, "left": left, "fits": left >= 0, "nearest": changes}


def nearest(config, world, offered, imbalance):
    """The first few single changes after which the run fits; where none does, changes on top of the one that leaves
    most, up to `DEEP` of them; where those do not fit either, the last, whose `left` is negative."""
    changes = {}
    for _ in range(DEEP):
        found = []
        for field, values in candidates(changed(config, changes)).items():
            for value in values if field not in changes else ():
                mine = changes | {field: value}
                run = changed(config, mine)
                if not problems(run, world):
                    left = offered - memory.needed(memory.per_rank(run, world, imbalance=imbalance))
                    found.append({"change": mine, "left": left})
        if fitting := [choice for choice in found if choice["left"] >= 0]:
            return fitting[:SHOWN]
        if not found:
            break
        best = max(found, key=lambda choice: choice["left"])
        changes = best["change"]
    return [best] if changes else []


def candidates(config):
    """{field: values to try}, what costs least speed first."""
    cut, kinds = config.parallel, ("none", "selective", "full")
    doubled = lambda n: [n * 2**i for i in range(1, 5)]  # noqa: E731
    return {
        "optimizer.distributed": [] if config.optimizer.distributed else [True],
        "micro_batch": [n for n in (config.micro_batch // 2, 1) if 0 < n < config.micro_batch][:2],
        "recompute": kinds[kinds.index(config.recompute) + 1 :],
        "parallel.expert": doubled(cut.expert) if config.model.moe else [],
        "parallel.context": doubled(cut.context),
        "parallel.tensor": doubled(cut.tensor),
        "parallel.pipeline": doubled(cut.pipeline),
        "optimizer.gradients": ["bf16"] if config.optimizer.gradients == "fp32" else [],
    }


def changed(config, values):
    """A Config with other values of `candidates`; tensor parallelism comes with sequence parallelism."""
    top = {field: value for field, value in values.items() if "." not in field}
    for part in ("parallel", "optimizer"):
        mine = {field.split(".")[1]: value for field, value in values.items() if field.startswith(part)}
        if "tensor" in mine:
            mine["sequence_parallel"] = True
        if mine:
            top[part] = getattr(config, part).model_copy(update=mine)
    return config.model_copy(update=top)


def table(found):
    """What `answer` returns, for people; GiB."""
    stages = found["stages"]
    kinds = list(dict.fromkeys(kind for stage in stages for kind in stage["activations"]))
    size = lambda n: f"{n / GIB:,.2f}"  # noqa: E731

    def line(name, cells):
        return f"{name:<26}" + "".join(f"{cell:>12}" for cell in cells)

    lines = [f"phase {found['phase']}, {found['world']} ranks; GiB of each pipeline stage's fullest rank (~ assumed)"]
    lines.append(line("stage", range(len(stages))))
    lines += [line(part, (size(stage[part]) for stage in stages)) for part in PARTS]
    lines.append("activations of a micro-batch")
    for kind in kinds:
        mark = "~ " if kind == "moe" and found["imbalance"] != 1 else ""
        lines.append(line(f"  {mark}{kind}", (size(stage["activations"].get(kind, 0)) for stage in stages)))
    lines.append(line("in flight", (f"x {stage['in_flight']:g}" for stage in stages)))
    lines.append(line("  kept", (size(stage["kept"]) for stage in stages)))
    lines.append(line("  alive besides", (size(stage["temporary"]) for stage in stages)))
    names = {"peak": "= activations"}
    for part in SUMS:
        name = names.get(part, part)
        lines.append(line(f"~ {name}" if part in ASSUMED else name, (size(stage[part]) for stage in stages)))
    fullest = max(range(len(stages)), key=lambda number: stages[number]["total"])
    offer = f"{found['gpu']}: {size(found['memory'])} GiB"
    if found["fits"]:
        return "\n".join([*lines, "", f"{offer}; ~ {size(found['left'])} GiB left on stage {fullest}"])
    lines += ["", f"{offer}; stage {fullest} does not fit, by ~ {size(-found['left'])} GiB"]
    for choice in found["nearest"]:
        change = " ".join(f"{field}={str(value).lower()}" for field, value in choice["change"].items())
        if "parallel.tensor" in choice["change"]:
            change += " parallel.sequence_parallel=true"
        if choice["left"] >= 0:
            lines.append(f"it fits with {change}: ~ {size(choice['left'])} GiB left")
        else:
            lines.append(f"nearest: {change}, which does not fit by ~ {size(-choice['left'])} GiB")
    return "\n".join(lines)
