"""How far a failure reaches: the kinds of layers at which it leaves in doubt what needs its spec.

                              linear
            ┌────────────┬──────┴────┬──────────────┐
      fused_linear   embedding     conv2d     quantized_base
                                     │
                               grouped_conv2d

What fails for one kind may fail for each below it, for the same cause. It says nothing of the others: a
convolution with a wrong bias hides no linear layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.adapter import Capabilities
from harness.case import LAYER_OF, Case

if TYPE_CHECKING:
    from harness.judge import Result

EVERY_KIND = frozenset({*Capabilities.KNOWN["layers"], "quantized_base"})

_BELOW = {
    "linear": EVERY_KIND,
    "conv2d": frozenset({"conv2d", "grouped_conv2d"}),
}


def kind_of(case: Case) -> str:
    """The kind of layer that a case adapts; it is claimed by that name."""
    return LAYER_OF.get(case.specimen, "linear")


def reach(result: Result) -> frozenset[str]:
    """The kinds that a result leaves in doubt; what is not claimed or known to fail leaves none.

    All, where nothing was judged, or a failure ended the judging or is of no case.
    """
    if result.outcome not in {"failed", "not_run"}:
        return frozenset()
    ended = any(not f.case or f.kind in {"hang", "crash"} for f in result.failures)
    if result.outcome == "not_run" or ended:
        return EVERY_KIND
    kinds = {kind_of(Case.parse(failure.case)) for failure in result.failures}
    return frozenset().union(*(_BELOW.get(kind, {kind}) for kind in kinds))
