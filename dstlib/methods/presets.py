"""The methods of the field, each a value with its source. A variant is ``dataclasses.replace``.

What they have in common is one clock and one way of counting, so that they compare: updates each 100 optimizer
steps until 75 % of the run, unless the paper's point is another. What an update drops is rounded as the authors'
program does. Where a preset deviates from its paper, its
``reference`` says so.

>>> from dataclasses import replace
>>> mine = replace(GRANET, interval=1000, granularity=masking.Kernel())
>>> print(METHODS["rigl"].reference[:17])
Evci et al. 2020,
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from dstlib import masking
from dstlib.errors import require, similar
from dstlib.methods.method import Method
from dstlib.schedules import Alternating, Constant, Cosine, Cubic, Cycles, Linear, Sigmoid, Stages

STATIC = Method(
    name="static",
    reference="A random mask that never changes; the baseline of every paper on the subject.",
    interval=None,
)

SET = Method(
    name="set",
    reference="Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse "
    "connectivity, Nature Communications; grown weights start at zero, as in the authors' CIFAR-10 program. Deviates: "
    "updates each 100 steps, not each epoch, until 75 % of the run, and ERK where the paper has ER on linear layers.",
    drop=masking.sign_balanced,
    drop_fraction=Constant(0.3),
)

RIGL = Method(
    name="rigl",
    reference="Evci et al. 2020, Rigging the lottery: making all tickets winners, ICML, Algorithm 1. "
    "Deviates: the optimizer step at an update proceeds, with the new mask.",
    grow=masking.gradient,
)

GMP = Method(
    name="gmp",
    reference="Zhu & Gupta 2017, To prune, or not to prune, arXiv:1710.01878, equation 1. Starts dense.",
    grow=masking.magnitude,  # never asked: the target only shrinks and nothing is dropped beyond it
    distribution=masking.uniform,
    drop_fraction=Constant(0.0),
    ramp=Cubic(0.0, 1.0),
)

DSFF = Method(
    name="dsff",
    reference="Wu et al. 2024, E2ENet: dynamic sparse feature fusion, NeurIPS, arXiv:2312.04727. Deviates: "
    "drops floor(f·A) kernels where the published code rounds up.",
    granularity=masking.Kernel(),
    distribution=masking.uniform,
    drop_fraction=Cosine(0.5, end=0.001),
    interval=1200,
    stop=1.0,
)

SNFS = Method(
    name="snfs",
    reference="Dettmers & Zettlemoyer 2019, Sparse networks from scratch: faster training without losing "
    "performance, arXiv:1907.04840. Momentum is a trace of the dense gradient, as the optimizer's is masked. "
    "Deviates: an update each 100 steps, not each epoch, until 75 % of the run; what a full layer leaves goes to the "
    "others by their shares, not evenly; under Adam, too, momentum is the mean gradient, where the authors' program "
    "takes m/√v, which would need a second dense trace.",
    grow=masking.traced_magnitude,
    distribution=masking.uniform,
    drop_fraction=Cosine(0.5, end=0.005),
    allocate=masking.momentum_share,
    trace=masking.Trace(decay=0.9),
    round_up=True,
)

DSR = Method(
    name="dsr",
    reference="Mostafa & Wang 2019, Parameter efficient training of deep convolutional neural networks by dynamic "
    "sparse reparameterization, ICML, Algorithm 1. Deviates: the number to drop is a tenth of the active weights, "
    "where the paper sets it per network, and the interval is constant.",
    distribution=masking.uniform,
    drop_fraction=Constant(0.1),
    allocate=masking.AdaptiveThreshold(),
)

MEST = Method(
    name="mest",
    reference="Yuan et al. 2021, MEST: accurate and fast memory-economic sparse training framework on the edge, "
    "NeurIPS: elastic mutation (EM) of a fifth of the active weights, from 9/16 of the run on of a tenth, until 3/4, "
    "stem and head dense, as the authors' scripts have it. Deviates: an update each 100 steps, not each 5 epochs; the "
    "other layers make up for stem and head.",
    drop=masking.WeightAndGradient(0.01),
    distribution=masking.uniform_dense_ends,
    drop_fraction=Stages((0.2, 0.1, 0.0), at=(0.75, 1.0)),
)

MEST_SOFT = replace(
    MEST,
    name="mest_soft",
    reference="Yuan et al. 2021, MEST: elastic mutation with a soft memory bound (EM&S). New weights come on top of "
    "the target, half as many as there are, then a quarter, as the authors have it at 90 %, and the weakest of all go "
    "at the next update. Deviates: as mest.",
    drop_fraction=Constant(0.0),
    surplus=Stages((0.5, 0.25, 0.0), at=(0.75, 1.0)),
)

SET_ITOP = replace(
    SET,
    name="set_itop",
    reference="Liu et al. 2021, Do we actually need dense over-parameterization? In-time over-parameterization in "
    "sparse training, ICML: SET with long intervals and α = 0.5, to the end of the run.",
    drop=masking.magnitude,
    drop_fraction=Cosine(0.5, end=0.005),
    grown_init=masking.zeros,
    interval=1500,
    stop=1.0,
    round_up=True,
)

RIGL_ITOP = replace(
    RIGL,
    name="rigl_itop",
    reference="Liu et al. 2021, In-time over-parameterization, ICML: RigL with long intervals and α = 0.5.",
    drop_fraction=Cosine(0.5, end=0.005),
    interval=4000,
    stop=1.0,
    round_up=True,
)

GSE = Method(
    name="gse",
    reference="Heddes et al. 2024, Always-sparse training by growing connections with guided stochastic exploration, "
    "arXiv:2401.06898: only as many inactive weights as there are active ones, drawn at random, compete to grow by "
    "gradient; until 60 % of the run. Deviates: they are drawn uniformly, one of the paper's three ways; each layer "
    "exchanges its own share, where the published code ranks all layers together; an update each 100 steps, not 1000.",
    grow=masking.AmongSome(masking.gradient),
    drop_fraction=Cosine(0.2),
    stop=0.6,
    regrow=False,
)

SEFT = Method(
    name="seft",
    reference="Xiao et al. 2025, Leave it to the specialist: repair sparse LLMs with sparse fine-tuning via sparsity "
    "evolution, arXiv:2505.24037: from the zeros of a pruned model, what matters least to the loss is dropped, and "
    "what has the largest gathered gradient grows. The authors' program was not found: f, falling linearly from 0.2, "
    "five steps of gradients and an update each 100 steps are those of the program of SpIEL (Ansell et al. 2024), on "
    "which it builds. Deviates: all active weights train, where the paper trains a sparse part of the change.",
    drop=masking.saliency,
    grow=masking.traced_magnitude,
    distribution=masking.uniform,
    drop_fraction=Linear(0.2),
    stop=1.0,
    trace=masking.Trace(steps=5),
)

CYCLIC = Method(
    name="cyclic",
    reference="Li et al. 2024, Pushing the limits of sparsity: a bag of tricks for extreme pruning, arXiv:2411.13545 "
    "(EAST), its cyclic sparsity: twice, for a fifth of the run each, the density rises by a cosine to three times the "
    "final one and falls back. Deviates: each update exchanges a share as well, each 100 steps throughout, where the "
    "published code does so after the cycles, each 4000. Its other parts, activations that fade from DyReLU to ReLU "
    "and blocks that share weights, belong to the network.",
    grow=masking.gradient,
    drop_fraction=Cosine(0.5, end=0.005),
    ramp=Cycles(),
    start_density=masking.Times(3),
    stop=1.0,
    round_up=True,
)

GRANET = Method(
    name="granet",
    reference="Liu et al. 2021, Sparse training via boosting pruning plasticity with neuroregeneration, NeurIPS, "
    "Algorithm 1, from dense: weights of all layers are pruned together along the cubic ramp, which ends halfway, "
    "while each layer exchanges its weakest half, falling by a cosine to the end of the run. The authors' program ends "
    "the ramp at 0.3 of the run on ImageNet, at 0.69 on CIFAR: replace(GRANET, ramp=Cubic(0.0, 1.0, until=0.3)). "
    "Deviates: an update each 100 steps, where it takes 1000 to 4000.",
    grow=masking.gradient,
    drop_fraction=Cosine(0.5, end=0.005),
    ramp=Cubic(0.0, 1.0, until=0.5),
    allocate=masking.global_units,
    stop=1.0,
    round_up=True,
)

GRANET_SPARSE = replace(
    GRANET,
    name="granet_sparse",
    reference="Liu et al. 2021 (GraNet), from sparse: as granet, from an ERK mask of density 0.5.",
    start_density=0.5,
)

GMP_GLOBAL = replace(
    GMP,
    name="gmp_global",
    reference="Zhu & Gupta 2017, the cubic ramp, with one magnitude threshold for all layers (Han et al. 2015).",
    allocate=masking.global_units,
)

ACDC = Method(
    name="acdc",
    reference="Peste et al. 2021, AC/DC: alternating compressed/decompressed training of deep neural networks, "
    "NeurIPS, Algorithm 1, pruning all layers together: a tenth of the run dense, then twentieths sparse and dense in "
    "turn, the last dense one twice as long, and sparse from 0.85 on, as on ImageNet. The interval is a phase. "
    "Deviates: where 20 updates do not divide the run, a phase begins at the next one.",
    grow=masking.magnitude,  # chooses nothing: what grows is everything
    drop_fraction=Constant(0.0),
    ramp=Alternating(warmup=0.1, phase=0.05, settle=0.85, last_dense=0.1),
    allocate=masking.global_units,
    interval=0.05,
    stop=1.0,
    reset_state=True,
)

SRIGL = Method(
    name="srigl",
    reference="Lasby et al. 2024, Dynamic sparse training with structured sparsity, ICLR: constant fan-in with "
    "neuron ablation, γ = 0.3 as for convolutional networks; replace(SRIGL, allocate=NeuronAblation(0.95)) for "
    "vision transformers. As in the published code, all neurons are looked at anew at each update, γ is of the "
    "fan-in before any was ablated, rounded down, and more stay than hold the weights. Deviates from the code: of "
    "the gradients those of inactive weights count, as in the paper (NeuronAblation(ranks_active_gradients=True): "
    "all), a layer's weights are the nearest number that its fan-in allows, and of what a neuron keeps beyond its "
    "fan-in the smallest go.",
    grow=masking.gradient,
    granularity=masking.FanIn(),
    allocate=masking.NeuronAblation(0.3),
)

CHT = Method(
    name="cht",
    reference="Zhang et al. 2024, Epitopological learning and Cannistraci-Hebb network shape intelligence "
    "brain-inspired theory for ultra-sparse advantage in deep learning, ICLR: links are removed, then predicted by "
    "CH3-L3p from those that are left; ties and links without a score by chance. Deviates: random first masks, where "
    "the paper correlates inputs; no removal of dead neurons at an update, which needs to know what layers follow "
    "each other; an update each 100 steps, not each epoch, until 75 % of the run. Options of its authors' code: "
    "replace(CHT, early_stop=0.9), drop_fraction=Cosine(0.3).",
    grow=masking.TiesByChance(masking.link_prediction_by_paths),
    distribution=masking.uniform,
    drop_fraction=Constant(0.3),
)

CHTS = replace(
    CHT,
    name="chts",
    reference="Zhang et al. 2025, Brain network science modelling of sparse neural networks enables transformers and "
    "LLMs to perform as fully connected, NeurIPS, arXiv:2501.19107, section 3.1: links are kept by draws with p ∝ "
    "|w|^T (α = 1; Sampled(relative_importance, ...) is α = 0) and grown by draws with p ∝ CH2-L3n. T = δ/(1-δ) rises "
    "from 1 to 3, δ from 0.5 to 0.75, and linearly as in the authors' code, where appendix H has δ rise so, up to "
    "0.9 for transformers. Deviates: as cht, and in grown weights that start from 0, not from what they once were; "
    "first masks are its bipartite receptive fields, r = 0.25.",
    drop=masking.Sampled(masking.magnitude, Linear(1.0, 3.0)),
    grow=masking.Sampled(masking.link_prediction),
    init=masking.ReceptiveField(0.25),
)

CHTSS = replace(
    CHTS,
    name="chtss",
    reference="Zhang et al. 2025 (CHTs), section 3.3: CHTss, from half of the weights along a sigmoid: what the "
    "density loses goes by relative importance, then the rest is exchanged as in chts, T from 1 to 9 and the share "
    "falling by a cosine, as in the authors' code for language models. Deviates: as chts; the share starts at 0.3, as "
    "for translation, where their language models have 0.1.",
    drop=masking.Sampled(masking.magnitude, Linear(1.0, 9.0)),
    prune=masking.relative_importance,
    drop_fraction=Cosine(0.3),
    ramp=Sigmoid(0.0, 1.0),
    start_density=0.5,
)

TOPKAST = Method(
    name="topkast",
    reference="Jayakumar et al. 2020, Top-KAST: top-k always sparse training, NeurIPS: forward with the largest "
    "weights, gradients for a further tenth, which are pulled to zero by 1/density. Deviates: the pull is 1e-4 "
    "beside the optimizer's own weight decay.",
    grow=masking.magnitude,
    distribution=masking.uniform,
    drop_fraction=Constant(1.0),  # nothing is kept for its own sake: growth by magnitude chooses all anew
    interval=1,
    stop=1.0,
    init=masking.magnitude,
    grown_init=masking.stored,
    storage=masking.DenseStorage(extra=0.1, decay=masking.OverDensity(1e-4)),
)

SRSTE = replace(
    TOPKAST,
    name="srste",
    reference="Zhou et al. 2021, Learning N:M fine-grained structured sparse neural networks from scratch, ICLR, "
    "equation 9: a straight-through gradient for all weights, and a pull of 2e-4 on the hidden ones. For other "
    "patterns, replace(SRSTE, granularity=NM(1, 4)).",
    granularity=masking.NM(2, 4),
    storage=masking.DenseStorage(decay=Constant(2e-4)),
)

SSTE = replace(
    SRSTE,
    name="sste",
    reference="Hu et al. 2024, S-STE: continuous pruning function for efficient 2:4 sparse pre-training, NeurIPS: a "
    "straight-through gradient, and of four weights the two largest are shown less the size of the third, times a "
    "number that is fixed for each weight at the start. Deviates: gradients are not sampled (MVUE), nor products in "
    "FP8: both are the kernels' matter.",
    storage=masking.DenseStorage(soft=True),
)

# in the order of docs/methods.md: one density throughout; one that moves; structure, links, weights that live on
_SPARSE = (STATIC, SET, SET_ITOP, RIGL, RIGL_ITOP, GSE, SEFT, SNFS, DSR, MEST, MEST_SOFT)
_RAMPED = (GRANET, GRANET_SPARSE, GMP, GMP_GLOBAL, ACDC, CYCLIC)
_OTHERS = (SRIGL, CHT, CHTS, CHTSS, TOPKAST, SRSTE, SSTE, DSFF)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in (*_SPARSE, *_RAMPED, *_OTHERS)})


def find_method(method: str | Method) -> Method:
    """Returns the method of that name; a Method is its own answer.

    Raises:
        SettingError: There is none.

    >>> find_method("rigl").interval
    100
    """
    if isinstance(method, Method):
        return method
    require(
        isinstance(method, str) and method in METHODS,
        "method",
        "sparsify()",
        allowed=f"one of {', '.join(METHODS)}, or a dstlib.Method",
        given=repr(method),
        remedy=f"Similar: {similar(str(method), METHODS)}.",
    )
    return METHODS[method]
