"""deeprec beneath other libraries: their hot functions replaced by ours, their signatures kept.

One module a library: :mod:`~deeprec.integrations.trl`, :mod:`~deeprec.integrations.verl`,
:mod:`~deeprec.integrations.openrlhf` and :mod:`~deeprec.integrations.recbole` say what is
replaced; :mod:`~deeprec.integrations.patching` does the replacing. None of these libraries is a
dependency: each is imported when it is patched.
"""

from deeprec.integrations.patching import Patch, explain, patch, unpatch

__all__ = ["Patch", "explain", "patch", "unpatch"]
