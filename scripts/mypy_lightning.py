"""For mypy: the attributes that Lightning gives its Trainer outside of the class, where no type checker finds them."""

from collections.abc import Callable

from mypy.nodes import MDEF, SymbolTableNode, Var
from mypy.plugin import ClassDefContext, Plugin
from mypy.types import AnyType, TypeOfAny

_TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
_ATTRIBUTES = ("callbacks", "datamodule", "fast_dev_run", "log_every_n_steps")


class TrainerAttributes(Plugin):
    """Declares them, of any type."""

    def get_customize_class_mro_hook(self, fullname: str) -> Callable[[ClassDefContext], None] | None:
        """Called for each class that mypy reads."""
        return _declare if fullname == _TRAINER else None


def _declare(context: ClassDefContext) -> None:
    info = context.cls.info
    for name in _ATTRIBUTES:
        attribute = Var(name, AnyType(TypeOfAny.explicit))
        attribute.info = info
        attribute._fullname = f"{info.fullname}.{name}"
        info.names[name] = SymbolTableNode(MDEF, attribute, plugin_generated=True)


def plugin(version: str) -> type[Plugin]:
    """Where mypy begins."""
    return TrainerAttributes
