"""What is trained: the method, its sizes, and the parts of the vision tower.

    options (flags, SAT's namespace) ─ from_options ┐
                                                    ├ AdapterConfig ─ to_json ─ model_config.json
    a checkpoint's model_config.json ─ from_json ───┘

The released script writes the method's flags into `model_config.json`, as keys of the same names. This module alone
reads and writes these keys. Only the standard library is imported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, TypeVar, cast

LORA_TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # SAT's names of a layer's linears
DEFAULT_LORA_TARGETS = ("query_key_value", "dense")  # what the released script trains
VISION_PARTS = ("vit", "qformer", "glm_proj")  # BLIP2's, in the order that an image goes through them

Item = TypeVar("Item")
Method = Literal["lora", "qlora", "ptuning"]
METHODS: tuple[Method, ...] = ("lora", "qlora", "ptuning")
# What gives a method's tensors their names, shapes and meaning: it can't change once they are trained.
LORA_KEYS = ("lora_rank", "lora_alpha", "layer_range", "lora_target")
PTUNING_KEYS = ("pre_seq_len",)
ADAPTER_KEYS = (
    *("use_lora", "use_qlora", "use_ptuning"), *LORA_KEYS, *PTUNING_KEYS, "lora_dropout", "train_parts",
)  # fmt: skip
# Tensors whose names have one of these parts are trained by the method.
TENSOR_NAMES: Mapping[Method, tuple[str, ...]] = {
    "lora": ("matrix_A", "matrix_B"),
    "qlora": ("matrix_A", "matrix_B"),
    "ptuning": ("ptuning",),
}


class AdapterKeys(TypedDict, total=False):
    """The keys of `model_config.json` that say what was trained, as the released script names them.

    The released script knows neither lora_alpha, lora_dropout, lora_target nor train_parts.
    """

    use_lora: bool
    use_qlora: bool
    use_ptuning: bool
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_target: list[str] | None
    layer_range: list[int] | None
    pre_seq_len: int
    train_parts: list[str]


@dataclass(frozen=True)
class AdapterConfig:
    """The adapters of a model, and what of it is trained."""

    methods: tuple[Method, ...] = ()  # that the model has
    rank: int = 10  # of the LoRA factors
    alpha: float = 1.0  # their product is scaled by alpha / rank
    dropout: float = 0.0  # probability, of what goes into the factors in training
    layers: tuple[int, ...] | None = None  # with LoRA, counted from 0; None or empty: all
    targets: tuple[str, ...] | None = None  # of LORA_TARGETS; None: DEFAULT_LORA_TARGETS
    prefix_length: int = 8  # positions per layer, of P-Tuning v2
    train_parts: tuple[str, ...] = ()  # "qformer" or "qformer=1e-5", as given to --train_parts
    resumed_methods: tuple[Method, ...] = ()  # those that a checkpoint brought along, and that stay as they are

    @classmethod
    def from_options(cls, options: object) -> "AdapterConfig":
        """What options ask for: a command line's, or SAT's namespace. Attributes that it lacks have their defaults."""
        given = {key: getattr(options, key) for key in ADAPTER_KEYS if hasattr(options, key)}
        return cls.from_json(cast(AdapterKeys, {**given, "layer_range": given.get("layer_range") or None}))

    @classmethod
    def from_json(cls, config: AdapterKeys) -> "AdapterConfig":
        """The adapters that a checkpoint with this config has. Keys that it lacks have the released script's values.

        The released README merges LoRA and writes an empty layer_range, which is no layer to SAT: nothing is left of it.
        """
        is_merged = config.get("layer_range") == [] and "finetuning" not in config
        uses: dict[Method, bool] = {
            "lora": bool(config.get("use_lora")) and not is_merged,
            "qlora": bool(config.get("use_qlora")) and not is_merged,
            "ptuning": bool(config.get("use_ptuning")),
        }
        return cls(
            methods=tuple(method for method in METHODS if uses[method]),
            rank=config.get("lora_rank", cls.rank),
            alpha=config.get("lora_alpha", cls.alpha),
            dropout=config.get("lora_dropout", cls.dropout),
            layers=_tuple_or_none(config.get("layer_range")),
            targets=_tuple_or_none(config.get("lora_target")),
            prefix_length=config.get("pre_seq_len", cls.prefix_length),
            train_parts=tuple(config.get("train_parts") or ()),
        )

    def to_json(self) -> AdapterKeys:
        """The keys of the released layout, for `model_config.json` and for SAT's namespace."""
        return {
            "use_lora": "lora" in self.methods,
            "use_qlora": "qlora" in self.methods,
            "use_ptuning": self.has_ptuning,
            "lora_rank": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "lora_target": None if self.targets is None else list(self.targets),
            "layer_range": list(self.layers) if self.layers else None,
            "pre_seq_len": self.prefix_length,
            "train_parts": list(self.train_parts),
        }

    def lora_section(self, num_layers: int) -> dict[str, object]:
        """The "lora" of a checkpoint's "finetuning", with what is left to defaults spelled out; empty without LoRA.

        Args:
            num_layers: of the language model.
        """
        if not self.has_lora:
            return {}
        sizes = {
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "layers": self.lora_layers(num_layers),
            "targets": list(self.lora_targets),
        }
        return {"lora": sizes}

    def resumed_from(self, config: AdapterKeys) -> "AdapterConfig":
        """The adapters of a model that starts from a checkpoint with this config, when these are asked for.

        The checkpoint's adapters stay, at their own sizes. What is asked for joins them, and is trained alone; where
        no method is asked for, the checkpoint's are trained. A merged or old checkpoint may hold sizes of a method
        that it doesn't have: they say nothing.
        """
        stored = AdapterConfig.from_json(config)
        kept = {key for key in stored.fixed_keys() if key in config}
        if stored.has_lora:  # the released script knew neither
            kept |= {"lora_alpha", "lora_target"}
        sizes = cast(AdapterKeys, {**self.to_json(), **{key: stored.to_json().get(key) for key in kept}})
        methods = {*self.methods, *(method for method in stored.methods if method == "ptuning" or not self.has_lora)}
        ordered = tuple(method for method in METHODS if method in methods)
        resumed = tuple(method for method in ordered if self.methods and method not in self.methods)
        return replace(AdapterConfig.from_json(sizes), methods=ordered, resumed_methods=resumed)

    @property
    def has_lora(self) -> bool:
        """Whether there are LoRA factors, over weights of any width."""
        return "lora" in self.methods or "qlora" in self.methods

    @property
    def has_ptuning(self) -> bool:
        """Whether there are P-Tuning prefixes."""
        return "ptuning" in self.methods

    @property
    def scale(self) -> float:
        """What the product of the LoRA factors is multiplied by."""
        return self.alpha / self.rank

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """The linears with LoRA, as they were named or by default."""
        return self.targets or DEFAULT_LORA_TARGETS

    def lora_layers(self, num_layers: int) -> list[int]:
        """The layers with LoRA, of so many."""
        return list(self.layers or range(num_layers))

    @property
    def trained_tensor_names(self) -> tuple[str, ...]:
        """Parts of the names of the adapters' tensors that are trained."""
        trained = [method for method in self.methods if method not in self.resumed_methods]
        return tuple(dict.fromkeys(name for method in trained for name in TENSOR_NAMES[method]))

    @property
    def part_rates(self) -> dict[str, float | None]:
        """The peak learning rate of each trained part of the vision tower; None where it is --lr."""
        split = (text.partition("=") for text in self.train_parts)
        return {part: float(rate) if equals else None for part, equals, rate in split}

    def fixed_keys(self) -> tuple[str, ...]:
        """The keys whose values can't change once these adapters are trained."""
        return (LORA_KEYS if self.has_lora else ()) + (PTUNING_KEYS if self.has_ptuning else ())

    def differing_keys(self, other: "AdapterConfig") -> list[str]:
        """The keys of sizes that other has otherwise. The order of layers and of targets doesn't count."""
        ours, theirs = self._comparable(), other._comparable()
        return [key for key in ours if ours[key] != theirs[key]]

    def _comparable(self) -> dict[str, object]:
        return {
            "lora_rank": self.rank,
            "lora_alpha": self.alpha,
            "layer_range": sorted(self.layers or ()),
            "lora_target": sorted(self.lora_targets),
            "pre_seq_len": self.prefix_length,
        }


def _tuple_or_none(items: Sequence[Item] | None) -> tuple[Item, ...] | None:
    return None if items is None else tuple(items)
