"""Registration with transformers' Auto classes that imports neither transformers nor torch before they are used.

``AutoModelForSemanticSegmentation.from_pretrained`` must know this package's models after ``import polypseg``, which
must not take seconds. So a stand-in of the configuration is registered as soon as transformers has its table of
configurations, now or later; the first lookup imports ``polypseg.modeling``, which registers the real classes.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPE = "polypseg"
"""``model_type`` in the config.json of this package's models."""
_TABLE = "transformers.models.auto.configuration_auto"


class DeferredConfig:
    """Stands in transformers' table for PolypSegConfig, of which it makes an instance whenever it is asked for one."""

    model_type = MODEL_TYPE

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return _config_class()(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """What ``AutoConfig.from_pretrained`` calls."""
        return _config_class().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, name_or_path: Any, **kwargs: Any) -> Any:
        """What a pipeline may call on the class that it finds in the table."""
        return _config_class().from_pretrained(name_or_path, **kwargs)


def _config_class() -> Any:
    from polypseg.modeling import PolypSegConfig  # registers itself and the model in the place of this stand-in

    return PolypSegConfig


def register_lazily() -> None:
    """Register with transformers, now if it is there, else at the moment when its table of configurations appears."""
    table = sys.modules.get(_TABLE)
    if hasattr(table, "AutoConfig"):
        _register(table)
    elif not any(isinstance(finder, _AfterTable) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTable())


def _register(table: Any) -> None:
    if MODEL_TYPE not in table.CONFIG_MAPPING:
        table.AutoConfig.register(MODEL_TYPE, DeferredConfig)


class _AfterTable:
    """An import hook for one module: lets the others find it, registers when it has run, and goes away."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)  # the loader is itself again, whatever happens next
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register(module)

        vars(loader)["exec_module"] = exec_module
        return spec
