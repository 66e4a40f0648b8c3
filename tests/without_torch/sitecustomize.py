"""Hides torch from each Python with this folder on its path, as after `pip install "jaxft[text]"`."""

import importlib.machinery
import sys

_find = importlib.machinery.PathFinder.find_spec


class _Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "torch" else _find(name, path, target)


sys.meta_path = [_Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
