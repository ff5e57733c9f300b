"""What units of a site are worth: scores of its entries, averaged."""

from torch import Tensor

from dstlib import masking
from dstlib.errors import ScoreError
from dstlib.masking import Site
from dstlib.sparsifier.plan import Plan


def score_units(site: Site, score: Tensor, plan: Plan) -> Tensor:
    """Averages scores over units; an error says which weight it was."""
    try:
        return masking.unit_score(score, site.mask.shape, plan.method.granularity)
    except ScoreError as error:
        raise ScoreError(f"{site.name} at step {site.step}: {error}") from error
