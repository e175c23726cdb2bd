"""Something to do once another library is imported: importing it for that would take time, or it is not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable


class _Finder:
    """A finder of one module, which does what is to be done after that module has run, and is gone."""

    def __init__(self, name: str, then: Callable):
        self.name = name
        self.then = then

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module
        return spec


def when_imported(name: str, then: Callable) -> None:
    """`then(module)`, now or as soon as the module is imported."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, then))
