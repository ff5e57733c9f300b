"""Every family of the transformer library, built small from its own default configuration, and what it is called with.

Widths are divided, depths and vocabularies cut, numbers of heads and images stay: so what must divide still does. What
this does not build or call, a test names; it guesses nothing about a weight.
"""

import copy
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import configuration_auto, modeling_auto

VOCABULARY, EXPERTS, IMAGE = 199, 8, 256
MOST_PARAMETERS = 25_000_000
SCALES = ((16, 2), (64, 9), (4, 1))  # widths divided by, layers at most; the first that runs to its end
HEADS = ("SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION")
_DEPTH = re.compile(
    r"((num|n)_(?!feat_extract)(.*_)?(layers?|blocks|hidden_groups)|depth|(?!num_).*_layers|.*_depth|layers)"
)
_TOKEN = re.compile(r".*(token_id|token_index|_idx|_token)s?|.*_id")
_EXPERTS = re.compile(r"(moe_)?(num|n)(_.*)?_experts(_per_layer)?")
_TYPES = re.compile(r".*(layer|block|mixer|attention)s?_(block_)?types?|layers_block_type")
_WIDTH = re.compile(
    r".*(size|dim|dims|model|embd|ffn|inner|width|rank|channels?|hidden|filters|units|features|mlp|planes|state)s?(_.*)?"
)
_NOT_WIDTH = re.compile(
    r"(num|min|max|use)_.*|n_(?!embd|inner|hidden).*|.*(image|patch|kernel|stride|conv|window|num_channels|in_chan|sample"
    r"|position|context_length|dilation|factor|groups?$|heads?$|_per_|chunk|frame|fps|freq|mel|dropout|crop|resolution"
    r"|spatial|temporal|pool|stage|feature_layer|out_indices|hop|fft|period|topk|codebook_size|bins|scale|ratio|shape|seq"
    r"|length|std|type_vocab|tile|levels?$|steps|divisor|grid|theta|num_labels).*"
)
# What their configurations leave open, or what does not survive being made small.
_SETTINGS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8},
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "bamba": {"hidden_size": 256, "mamba_n_heads": 8, "mamba_d_head": 64},
    "dory": {  # an attention and a perceptron count one each
        **{"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2},
        "layer_types": ["full_attention", "mlp"] * 3,
    },
    "granitemoehybrid": {"hidden_size": 256, "mamba_n_heads": 8, "mamba_d_head": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "num_hidden_layers": 2, "intermediate_size": 128, "layer_types": None},
    "glm5_next_text": {"index_topk": 16},
    "nemotron": {"num_key_value_heads": 8},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "dots3_note_text": {"first_k_dense_replace": 0},  # its only layer has experts
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 10000.0}},
}
_MADE_ANEW = ("out_features", "out_indices", "stage_names")
_OPEN = {
    "vocab_size": 99,
    "moe_intermediate_size": 512,
    "head_dim": 64,
    "moe_topk": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}


def families() -> list[str]:
    """The types of models that the library knows, in its order."""
    return [str(name) for name in configuration_auto.CONFIG_MAPPING_NAMES]


def classes(name: str) -> tuple[type, list[type[nn.Module]]]:
    """The configuration of a family, and its models: those with the heads that most have come first."""
    mappings = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS] + ["MODEL_MAPPING_NAMES"]
    mappings += sorted(n for n in dir(modeling_auto) if n.startswith("MODEL_") and n.endswith("_NAMES"))
    config = configuration_auto.CONFIG_MAPPING[name]
    named = [getattr(modeling_auto, mapping).get(name, ()) for mapping in mappings]
    names = [n for several in named for n in ((several,) if isinstance(several, str) else several)]
    models = [model for n in dict.fromkeys(names) if (model := getattr(transformers, n, None)) is not None]
    if not models:
        try:
            module = importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
        except ImportError:
            return config, []
        mine = [c for c in vars(module).values() if inspect.isclass(c) and getattr(c, "config_class", None) is config]
        models = [c for c in mine if issubclass(c, transformers.PreTrainedModel) and "forward" in vars(c)][::-1]
    return config, models


def small(name: str, model: type[nn.Module], divisor: int, layers: int) -> nn.Module | None:
    """Builds a model of a family small; None where it stays too large for a test."""
    config, _ = classes(name)
    settings = config(**_SETTINGS.get(name, {})).to_dict()
    has_sections = "mrope_section" in inspect.getsource(sys.modules[model.__module__])
    shrunk = _shrink(settings, divisor, layers, has_sections=has_sections)
    made = config.from_dict(shrunk | _SETTINGS.get(name, {}))
    made._attn_implementation = made._experts_implementation = "eager"
    with torch.device("meta"):
        if sum(p.numel() for p in model(copy.deepcopy(made)).parameters()) > MOST_PARAMETERS:
            return None
    torch.manual_seed(0)
    built = model(made).eval().float()
    for p in built.parameters():
        p.requires_grad_(True)
        if p.ndim > 1:
            p.data.normal_(0, 0.1)
    return built


def builds(name: str, *scales: tuple[int, int]) -> Iterator[nn.Module]:
    """Yields a family at each of these scales, or all, at which it can be built, and at last as its authors have it.

    That one has no data. Settings that do not go together are refused by each class with errors of its own.
    """
    config, models = classes(name)
    for model in models:
        num = 0
        for divisor, layers in scales or SCALES:
            try:
                built = small(name, model, divisor, layers)
            except Exception:
                continue
            if built is not None:
                num += 1
                yield built
        try:
            with torch.device("meta"):
                built = model(config(**_SETTINGS.get(name, {})))
        except Exception:
            built = None
        if built is not None:
            yield built
        if num or built is not None:
            return


def _shrink(settings: dict[str, Any], divisor: int, layers: int, *, has_sections: bool) -> dict[str, Any]:
    settings = {key: value for key, value in settings.items() if key not in _MADE_ANEW}
    made = {key: _smaller(key, value, settings, divisor, layers, has_sections) for key, value in settings.items()}
    if has_sections and made.get("num_attention_heads") and "rope_parameters" in made:
        rope = made["rope_parameters"] or {"rope_type": "default", "rope_theta": 10000.0}
        size = made.get("head_dim") or made["hidden_size"] // made["num_attention_heads"]
        half = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
        made["rope_parameters"] = rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    return made


def _smaller(key: str, value: Any, beside: dict[str, Any], divisor: int, layers: int, has_sections: bool) -> Any:
    """Returns one setting of a small model."""
    if value is None:
        return _OPEN[key] // (divisor if key in ("moe_intermediate_size", "head_dim") else 1) if key in _OPEN else None
    if isinstance(value, dict):
        if key == "per_layer_config":
            return {k: v for k, v in value.items() if int(k) < layers}
        return value if key in ("id2label", "label2id") else _shrink(value, divisor, layers, has_sections=has_sections)
    if isinstance(value, list | tuple):
        if _TYPES.fullmatch(key):
            return (list(dict.fromkeys(value)) + list(value))[:layers]
        if len(value) == beside.get("num_hidden_layers"):
            value = value[:layers]
        return [_smaller(key, v, beside, divisor, 1, has_sections) for v in value]
    if type(value) is not int:
        return value
    if "vocab" in key and "type_vocab" not in key:
        return min(value, VOCABULARY)
    if _TOKEN.fullmatch(key):
        return value if value < VOCABULARY else 3 + value % 97
    if key in ("n_group", "topk_group"):
        return 1
    if _DEPTH.fullmatch(key):
        return min(value, layers)
    if key in ("num_frames", "frames_per_clip"):
        return min(value, 8)
    if key == "depths":
        return 1
    if _EXPERTS.fullmatch(key):
        return min(value, EXPERTS)
    if re.fullmatch(r".*experts_per_tok(en)?|.*top_?k", key):
        return min(value, 2)
    if key in ("image_size", "input_size"):
        return value if value <= IMAGE else 224 if beside.get("patch_size") == 14 else IMAGE
    is_width = _WIDTH.fullmatch(key) and not _NOT_WIDTH.fullmatch(key)
    return max(value // divisor, 2) if is_width and value >= 32 and value % divisor == 0 else value


def inputs(model: nn.Module) -> dict[str, Any]:
    """Guesses from the signature of a forward what it is called with."""
    config, asked = model.config, inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def number(*names: str, default: int) -> int:
        parts = [
            config,
            *(c for key in ("vision_config", "audio_config", "encoder") if (c := getattr(config, key, None))),
        ]
        found = [getattr(part, name, None) for part in parts for name in names]
        found = [v[0] if isinstance(v, list | tuple) and v else v for v in found]
        return next((v for v in found if type(v) is int), default)

    size = number("image_size", "input_size", default=224)
    channels = number("num_channels", "in_channels", "in_chans", default=3)
    tokens = torch.randint(5, 90, (1, 12), generator=generator)
    width = number("hidden_size", "d_model", default=64)
    patch = number("patch_size", default=14)
    patches = random(16, channels * number("temporal_patch_size", default=1) * patch**2)
    tall = random(1, number("num_mel_bins", "feature_size", default=80), 3000)
    video = random(1, number("frames_per_clip", "num_frames", default=8), channels, size, size)
    known = {
        "input_ids": tokens,
        "decoder_input_ids": tokens[:, :6],
        "pixel_values": random(1, channels, size, size),
        "pixel_values_videos": video,
        "input_values": random(1, 16000),
        "input_features": tall,
        "hidden_states": patches if "grid_thw" in asked else random(1, 16, width),
        "grid_thw": torch.tensor([[1, 4, 4]]),
        "inputs_embeds": random(1, 16, width),
        "encoder_hidden_states": random(1, 16, width),
        "query_embeds": random(1, 8, width),
        "bbox": torch.zeros(1, 12, 4, dtype=torch.long),
        "use_cache": False,
    }
    wanted = {key for key, parameter in asked.items() if parameter.default is parameter.empty}
    wanted |= {main, "decoder_input_ids", "bbox", "use_cache", *(() if "input_ids" in asked else known)}
    if {"text_config", "vision_config"} <= set(vars(config)) and not hasattr(config, "image_token_id"):
        wanted |= {"input_ids", "pixel_values"}
    return {key: value for key, value in known.items() if key in asked and key in wanted}
