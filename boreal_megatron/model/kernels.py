"""Which implementation of each operation of `boreal_kernels` a network calls: chosen once, when it is built."""

from functools import cache

from boreal_kernels.backend import BACKENDS, choose

from boreal_megatron.errors import ProblemsError


@cache
def chosen(kernels, head_dim, device):
    """{operation: `boreal_kernels.backend.Choice`}, each with its reason.

    Args:
        kernels: `config.schema.Kernels`.
        head_dim: of Gated DeltaNet.
        device: torch.device of the parameters.

    Raises:
        ProblemsError: an implementation asked for by name cannot run on this device; it is never replaced silently.
    """
    found, problems = {}, []
    for operation in BACKENDS:
        name = "delta_rule" if operation == "gated_delta_rule" else "others"
        try:
            found[operation] = choose(operation, getattr(kernels, name), device=device, head_dim=head_dim)
        except ValueError as error:
            problems.append(f"kernels.{name}: {error}")
    if problems:
        raise ProblemsError("kernels", problems)
    return found


def lines(choices):
    """What to tell people: one line for each implementation and reason."""
    groups = {}
    for choice in choices.values():
        groups.setdefault((choice.backend, choice.reason), []).append(choice.operation)
    return [f"{backend} ({reason}): {', '.join(names)}" for (backend, reason), names in groups.items()]
