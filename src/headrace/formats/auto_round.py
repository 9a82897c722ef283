"""Reading what AutoRound saves in its own format: GPTQ's or AWQ's arrangement under another name.

Source: https://github.com/intel/auto-round (0.16: ``export/export_to_autoround``, ``inference/backend.py``).
``packing_format`` says which: ``auto_round:auto_gptq`` is GPTQ's version 1, ``auto_round`` and
``auto_round:gptqmodel`` its version 2, ``auto_round:auto_awq`` AWQ's GEMM. What AutoRound saves for other engines
(``auto_gptq``, ``auto_awq``) names their method and is read as theirs.
"""

from collections.abc import Mapping

from headrace.base.errors import UnsupportedModelError
from headrace.formats.awq import read_awq
from headrace.formats.gptq import PARTS, read_gptq
from headrace.formats.quantized_module import Parts
from headrace.models.config import Config
from headrace.numerics.tensor import RawTensor

__all__ = ["PARTS", "read_auto_round"]

_GPTQ_VERSIONS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
}
_AWQ = "auto_round:auto_awq"
_MOST_BITS = 8  # above, a module is stored as it was


def read_auto_round(config: Config, modules: Mapping[str, Parts]) -> dict[str, RawTensor]:
    """The weights of all modules that are stored quantized, by module, not yet read.

    Raises:
        CheckpointError: config and tensors contradict each other; names module, part and scheme.
        UnsupportedModelError: the config asks for something that is not read; names it.
    """
    config.require("data_type", "int")
    config.require("packing_format", *_GPTQ_VERSIONS, _AWQ)
    if config.has("extra_config"):
        _check_modules(config.section("extra_config"), config)
    packing = config.text("packing_format", "auto_round:auto_gptq")
    if packing == _AWQ:
        return read_awq(config.overridden({"version": "gemm", "extra_config": None}), modules)
    version = _GPTQ_VERSIONS[packing]
    return read_gptq(config.overridden({"checkpoint_format": version, "extra_config": None}), modules)


def _check_modules(entries: Config, config: Config) -> None:
    """Schemes of single modules may only say that these are not quantized."""
    for name in entries.unread():
        entry = entries.section(name)
        if not entry.has("bits") or entry.integer("bits") <= _MOST_BITS:
            raise UnsupportedModelError(
                f"extra_config in {config.where} gives {name} a scheme of its own, which is not read.",
                "Use one scheme throughout.",
            )
