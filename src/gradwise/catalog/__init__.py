"""The papers as data, and how a paper's name finds its method, its claim and its published figures.

>>> from gradwise.catalog import find, records
>>> find("gam").title
'Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves Generalization'
>>> sorted({record.status for record in records()} - {"planned", "method", "working"})
[]

Other packages add papers through the entry-point group ``gradwise.catalog``; see :mod:`gradwise.catalog.records`.
"""

from gradwise.catalog.published import published
from gradwise.catalog.records import GROUP, Record, UnknownNameError, families, find, find_family, records
from gradwise.catalog.results import published_path
from gradwise.catalog.status import resolves

__all__ = [
    "GROUP",
    "Record",
    "UnknownNameError",
    "families",
    "find",
    "find_family",
    "published",
    "published_path",
    "records",
    "resolves",
]
