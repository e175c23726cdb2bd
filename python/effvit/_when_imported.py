"""Something to do once another library is imported: importing it for that would take time, or it is not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable


class _Finder:
    """A finder of one module: that which the other finders have, with something to do after it has run."""

    def __init__(self, name: str, then: Callable):
        self.name = name
        self.then = then

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Finder))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module
        return spec


def when_imported(name: str, then: Callable) -> None:
    """`then(module)`, now or as soon as the module is imported, and after each reload."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, then))
