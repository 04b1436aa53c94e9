"""What a checkpoint can be exported as: a name for `boreal export --as`, and everything that depends on it."""

from collections.abc import Callable
from dataclasses import dataclass

from boreal_megatron.convert import hf_config, qwen3_5
from boreal_megatron.convert.mapping import mapping


@dataclass(frozen=True)
class Target:
    """A kind of Hugging Face folder.

    Attributes:
        name: as on the command line.
        config_dict: (model, *, eos_token_id, dtype) -> contents of config.json.
        rules: model -> list of `mapping.Rule`.
        code_files: Python files of `hf_code` that go with the weights.
        check: model -> list of what keeps it from being exported so, each with what was found, expected, and to do.
    """

    name: str
    config_dict: Callable
    rules: Callable
    code_files: tuple[str, ...]
    check: Callable


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="boreal",
            config_dict=hf_config.hf_config_dict,
            rules=mapping,
            code_files=("configuration_boreal.py", "modeling_boreal.py"),
            check=hf_config.problems,
        ),
        Target(
            name="qwen3_5",
            config_dict=qwen3_5.config_dict,
            rules=qwen3_5.rules,
            code_files=(),
            check=qwen3_5.problems,
        ),
    )
}
