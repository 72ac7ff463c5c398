"""Doc."""
from __future__ import annotations
import os
import a.b.c as d, enum
from . import (one, two)
from .. import three
from .sub.mod import *
try:
    from fast import loads, dumps
except ImportError:
    from .slow import loads
class C:
    import inclass
def f():
    import lazily
