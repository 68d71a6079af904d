"""Everything that is known about a model before a byte of it is loaded: sizes, operations, memory.

    from mixformer.accounting import describe, description

    print("\\n".join(description(describe(model))))
"""

from mixformer.accounting.changes import Setup
from mixformer.accounting.describe import compare, describe
from mixformer.accounting.plan import Plan, make_plan
from mixformer.accounting.text import description
from mixformer.accounting.workload import Workload

__all__ = ["Plan", "Setup", "Workload", "compare", "describe", "description", "make_plan"]
