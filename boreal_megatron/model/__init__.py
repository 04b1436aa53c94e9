"""The network on megatron-core. The platform comes first: it imports megatron-core in its own way."""

from boreal_megatron import platform as platform
