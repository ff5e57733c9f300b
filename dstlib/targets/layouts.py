"""Layers of other libraries that multiply by a parameter of their own as it is, and how its matrices lie.

Told by the name of the class, or of one above it, so that no library has to be there. Of a raw parameter that no
table knows, nobody can say which axis counts the outputs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

_GRAPH_CONVS = "torch_geometric.nn.conv"
_KYUTAI = "transformers.models.kyutai_speech_to_text.modeling_kyutai_speech_to_text"


@dataclass(frozen=True)
class Layout:
    """How the matrices of a layer's parameters lie: (*, O, I), or (*, I, O) where they are transposed.

    ``parameters`` are the last parts of their names, ``*`` the experts, relations or layers, each a matrix of its own.
    Where the layer has a parameter called ``mixer``, that one mixes the matrices before each use.
    """

    parameters: tuple[str, ...]
    transposed: bool
    mixer: str = ""


_EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_LINEAR = Layout(("weight",), transposed=False)
_TURNED = Layout(("weight",), transposed=True)
_EXPERTS_LINEAR, _EXPERTS_TURNED = Layout(_EXPERTS, transposed=False), Layout(_EXPERTS, transposed=True)
# As the forward of transformers 5.24, torch_geometric 2.8 and diffusers 0.42 reads them: tests/test_foreign_layers.py
_LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "transformers.pytorch_utils.Conv1D": _TURNED,
        "transformers.models.convbert.modeling_convbert.GroupedLinearLayer": _TURNED,
        "transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts": _LINEAR,
        "transformers.models.moshi.modeling_moshi.MoshiFlexibleLinear": _LINEAR,
        f"{_KYUTAI}.KyutaiSpeechToTextFlexibleLinear": _LINEAR,
        "transformers.models.csm.modeling_csm.CsmCodebooksHead": _TURNED,
        "transformers.models.zamba.modeling_zamba.ZambaMambaMixer": Layout(
            ("x_proj_weight", "dt_proj_weight"), transposed=False
        ),
        "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts": _EXPERTS_TURNED,
        "transformers.models.llama4.modeling_llama4.Llama4TextExperts": _EXPERTS_TURNED,
        "transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": _EXPERTS_LINEAR,
        "transformers.models.step3p7.modeling_step3p7.Step3p7Experts": _EXPERTS_LINEAR,
        "transformers.models.inkling.modeling_inkling.InklingSharedExperts": _EXPERTS_LINEAR,
        "diffusers.models.transformers.transformer_nucleusmoe_image.SwiGLUExperts": _EXPERTS_TURNED,
        "torch_geometric.nn.dense.linear.Linear": _LINEAR,
        "torch_geometric.nn.dense.linear.HeteroLinear": _TURNED,
        f"{_GRAPH_CONVS}.dna_conv.Linear": _TURNED,
        f"{_GRAPH_CONVS}.gated_graph_conv.GatedGraphConv": _TURNED,
        f"{_GRAPH_CONVS}.gcn2_conv.GCN2Conv": Layout(("weight1", "weight2"), transposed=True),
        f"{_GRAPH_CONVS}.rgcn_conv.RGCNConv": Layout(("weight", "root"), transposed=True, mixer="comp"),
        f"{_GRAPH_CONVS}.rgat_conv.RGATConv": Layout(("weight", "q", "k", "e"), transposed=True),
        f"{_GRAPH_CONVS}.arma_conv.ARMAConv": Layout(("weight", "init_weight", "root_weight"), transposed=True),
    }
)
# Linear layers whose weight another module takes and multiplies by as inputs × outputs, by that module and their name.
_TURNED_BY_OWNER = frozenset(
    {("transformers.models.mobilebert.modeling_mobilebert.MobileBertLMPredictionHead", "dense")}  # beside the embedding
)


def is_turned_by_owner(owner: nn.Module | None, name: str) -> bool:
    """Whether the module that owns a linear layer of this name multiplies by its weight as inputs × outputs."""
    return any((f"{cls.__module__}.{cls.__qualname__}", name) in _TURNED_BY_OWNER for cls in type(owner).__mro__)


def layout_of(module: nn.Module, key: str, parameter: Tensor) -> Layout | None:
    """Returns how the matrices of a module's parameter lie, or None where no table knows."""
    known = (_LAYOUTS.get(f"{cls.__module__}.{cls.__qualname__}") for cls in type(module).__mro__)
    layout = next((found for found in known if found is not None), None) or _stated(module, parameter)
    return layout if layout is not None and key in layout.parameters else None


def overriding(module: nn.Module) -> Iterator[type]:
    """Yields the classes of a layer below the one that the table knows, whose forward may be another."""
    for cls in type(module).__mro__:
        if f"{cls.__module__}.{cls.__qualname__}" in _LAYOUTS:
            return
        yield cls


def _stated(module: nn.Module, parameter: Tensor) -> Layout | None:
    """Returns the layout of stacked experts that say it themselves, as those of transformers 5 do."""
    transposed = getattr(module, "is_transposed", None)
    is_stack = parameter.ndim == 3 and getattr(module, "num_experts", None) == len(parameter)
    if not isinstance(transposed, bool) or not is_stack:
        return None
    return _EXPERTS_TURNED if transposed else _EXPERTS_LINEAR
