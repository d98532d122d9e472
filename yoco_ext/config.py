"""Model configuration: one validated dataclass, the paper's presets, JSON round trip."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SELF_DECODERS = ("gated_retention", "sliding_window")
CHECKPOINT_FORMATS = ("unilm", "fla", "hf", "yoco")  # convert.py says what they are

# "official": the frequencies of the YOCO code (theta^-linspace(0, 1), end point included), interleaved pairs.
# "standard": theta^-(2i/D), pairs (i, i + D/2), as in most code bases; "standard_interleaved": pairs (2i, 2i + 1).
ROPE_STYLES = ("official", "standard", "standard_interleaved", "none")

# name: hidden size, layers, attention heads, KV heads, retention heads, feed-forward size.
# 160m..13b are the scaling runs of the paper (retention head dim 256, feed-forward 3x), 3b is YOCO-3B.
_PRESETS = {
    "160m": (768, 12, 12, 12, 3, 2304),
    "400m": (1024, 24, 16, 16, 4, 3072),
    "830m": (1536, 24, 12, 12, 6, 4608),
    "1.4b": (2048, 24, 16, 16, 8, 6144),
    "2.7b": (2560, 32, 20, 20, 10, 7680),
    "3b": (3072, 26, 24, 8, 24, 8192),
    "6.8b": (4096, 32, 32, 32, 16, 12288),
    "13b": (5120, 40, 40, 40, 20, 15360),
}


@dataclass(frozen=True)
class YOCOConfig:
    """Shape of a YOCO model. The defaults are YOCO-3B's, but for num_kv_heads: preset("3b") has 8.

    >>> YOCOConfig.preset("3b", self_decoder="sliding_window", window_size=2048)
    """

    vocab_size: int = 100_288
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_layers: int = 26
    num_self_layers: int | None = None  # layers of the self-decoder; default: the first half
    num_heads: int = 24  # query heads of the cross-decoder
    num_kv_heads: int | None = None  # heads of the shared K and V; default: num_heads
    self_decoder: str = "gated_retention"
    num_self_heads: int | None = None  # heads of the self-decoder; default: num_heads
    num_self_kv_heads: int | None = None  # sliding window only; default: num_self_heads
    window_size: int = 1024  # sliding window only: keys a query sees, itself included
    gate_logit_normalizer: float = 16.0  # tau: log decay = logsigmoid(x W) / tau
    self_rope: str = "official"
    cross_rope: str = "official"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    scale_embeddings: bool = True  # multiply embeddings by sqrt(hidden_size), as the official code does
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        def default(name: str, value: int) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        default("num_self_layers", self.num_layers // 2)
        default("num_kv_heads", self.num_heads)
        default("num_self_heads", self.num_heads)
        default("num_self_kv_heads", self.num_self_heads)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = field.type.split(" ")[0]
            allowed = {"int": int, "float": (int, float), "str": str, "bool": bool}[kind]
            if not isinstance(value, allowed) or (kind != "bool" and isinstance(value, bool)):
                raise ValueError(f"{field.name} must be of type {kind}, got {value!r}")
            if kind in ("int", "float") and not value > 0:
                raise ValueError(f"{field.name} must be positive, got {value}")
        if self.num_self_layers >= self.num_layers:
            raise ValueError(
                f"num_self_layers must be below num_layers ({self.num_layers}), got {self.num_self_layers}: "
                "the cross-decoder needs at least one layer"
            )
        for name, choices in (
            ("self_decoder", SELF_DECODERS),
            ("self_rope", ROPE_STYLES),
            ("cross_rope", ROPE_STYLES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for heads, kv_heads in (("num_heads", "num_kv_heads"), ("num_self_heads", "num_self_kv_heads")):
            if getattr(self, heads) % getattr(self, kv_heads):
                raise ValueError(f"{kv_heads} ({getattr(self, kv_heads)}) must divide {heads} ({getattr(self, heads)})")
            head_dim, rest = divmod(self.hidden_size, getattr(self, heads))
            if rest or head_dim % 8 or head_dim > 256:
                raise ValueError(
                    f"hidden_size / {heads} must be a multiple of 8 up to 256, "
                    f"got {self.hidden_size} / {getattr(self, heads)}"
                )
        if self.self_decoder == "gated_retention" and self.num_self_kv_heads != self.num_self_heads:
            raise ValueError("gated retention has no grouped heads: num_self_kv_heads must equal num_self_heads")

    @property
    def num_cross_layers(self) -> int:
        return self.num_layers - self.num_self_layers

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def self_head_dim(self) -> int:
        return self.hidden_size // self.num_self_heads

    @property
    def num_parameters(self) -> int:
        """Parameters without the embedding and the output projection, as the paper counts them."""
        d, ffn = self.hidden_size, 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        if self.self_decoder == "gated_retention":
            mixer = 5 * d * d + d * self.num_self_heads
        else:
            mixer = 2 * d * d + 2 * d * self.num_self_kv_heads * self.self_head_dim
        shared_kv = 2 * d * self.num_kv_heads * self.head_dim + d
        return self.num_self_layers * (mixer + ffn) + self.num_cross_layers * (2 * d * d + ffn) + shared_kv + d

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> YOCOConfig:
        """One of the paper's models: 160m, 400m, 830m, 1.4b, 2.7b, 3b, 6.8b, 13b."""
        if name.lower() not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(_PRESETS)}")
        hidden, layers, heads, kv_heads, self_heads, ffn = _PRESETS[name.lower()]
        fields = {
            "hidden_size": hidden,
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "num_self_heads": self_heads,
            "intermediate_size": ffn,
        }
        if overrides.get("self_decoder") == "sliding_window":
            fields["num_self_heads"] = heads  # head dim 256 is gated retention's
        return cls(**(fields | overrides))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> YOCOConfig:
        unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown configuration fields: {', '.join(sorted(unknown))}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, path: str | Path) -> YOCOConfig:
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_official(cls, params: Mapping[str, Any]) -> YOCOConfig:
        """From the `params.json` (YOCOArgs) of the official code."""
        window = params.get("sliding_window")
        heads = params["n_attn_heads"]
        return cls(
            vocab_size=params["vocab_size"],
            hidden_size=params["dim"],
            intermediate_size=params["hidden_dim"],
            num_layers=params["n_layers"],
            num_heads=heads,
            num_kv_heads=params.get("n_attn_kv_heads") or heads,
            num_self_heads=params["n_self_heads"],
            self_decoder="sliding_window" if window else "gated_retention",
            window_size=window or cls.window_size,
            rope_theta=params.get("rope_theta", 10_000.0),
            norm_eps=params.get("norm_eps", 1e-5),
        )

    @classmethod
    def from_fla(cls, params: Mapping[str, Any]) -> YOCOConfig:
        """From the `config.json` of flash-linear-attention's YOCO model."""
        mixer, cross = params["self_decoder_attn"], params["cross_decoder_attn"]
        kinds = {"gated_retention": "gated_retention", "swa": "sliding_window"}
        if mixer["type"] not in kinds:
            raise ValueError(f"self_decoder_attn type must be one of {', '.join(kinds)}, got {mixer['type']!r}")
        for name, wanted in (("qk_norm", False), ("qkv_bias", False), ("window_size", None)):
            if cross.get(name) not in (wanted, None):
                raise ValueError(f"cross_decoder_attn {name}={cross[name]} is not supported")
        if mixer.get("qkv_bias") or params.get("attnres_block_size") is not None:
            raise ValueError("qkv_bias and attnres_block_size are not supported")
        if mixer.get("rope_theta", 10_000.0) != cross.get("rope_theta", 10_000.0):
            raise ValueError("self_decoder_attn and cross_decoder_attn must have the same rope_theta")
        hidden = params["hidden_size"]
        # fla's rule when only a ratio is given: two thirds of it, rounded up to 256.
        ffn = params.get("intermediate_size") or -(-int(hidden * params.get("hidden_ratio", 4) * 2 / 3) // 256) * 256
        rope = {"fla": "standard_interleaved", "yoco": "official"}
        swa = mixer["type"] == "swa"
        return cls(
            vocab_size=params["vocab_size"],
            hidden_size=hidden,
            intermediate_size=ffn,
            num_layers=params["num_hidden_layers"],
            num_self_layers=params["num_self_decoder_layers"],
            num_heads=cross["num_heads"],
            num_kv_heads=cross.get("num_kv_heads") or cross["num_heads"],
            self_decoder=kinds[mixer["type"]],
            num_self_heads=mixer["num_heads"],
            num_self_kv_heads=(mixer.get("num_v_heads") if swa else None) or mixer["num_heads"],
            window_size=(mixer.get("window_size") if swa else None) or cls.window_size,
            gate_logit_normalizer=mixer.get("gate_logit_normalizer", 16.0),
            self_rope="standard" if swa else rope[mixer.get("rope_inv_freq", "fla")],
            cross_rope=rope[cross.get("rope_inv_freq", "fla")],
            rope_theta=cross.get("rope_theta", 10_000.0),
            norm_eps=params.get("norm_eps", 1e-6),
            tie_embeddings=params.get("tie_word_embeddings", False),
        )

    @classmethod
    def from_transformers(cls, fields: Mapping[str, Any]) -> YOCOConfig:
        """From the `config.json` of this package's transformers model: the fields of this class among transformers'
        own."""
        names = {"tie_word_embeddings": "tie_embeddings"}
        known = {field.name for field in dataclasses.fields(cls)}
        found = {names.get(name, name): value for name, value in fields.items()}
        return cls(**{name: value for name, value in found.items() if name in known})

    def to_transformers(self) -> dict[str, Any]:
        """The `config.json` of this package's transformers model."""
        fields = self.to_dict()
        fields["tie_word_embeddings"] = fields.pop("tie_embeddings")
        return {"architectures": ["YOCOExtForCausalLM"], "model_type": "yoco_ext", **fields}

    def to_official(self) -> dict[str, Any]:
        """The `params.json` (YOCOArgs) of the official code. Raises ValueError for a model it cannot express."""
        params = {
            "dim": self.hidden_size,
            "n_layers": self.num_layers,
            "hidden_dim": self.intermediate_size,
            "n_self_heads": self.num_self_heads,
            "n_attn_heads": self.num_heads,
            "n_attn_kv_heads": self.num_kv_heads,
            "vocab_size": self.vocab_size,
            "rope_theta": self.rope_theta,
            "norm_eps": self.norm_eps,
            "sliding_window": self.window_size if self.self_decoder == "sliding_window" else None,
        }
        self._same_model(self.from_official(params), "the official code", {"tie_embeddings"})
        return params

    def to_fla(self) -> dict[str, Any]:
        """The `config.json` of flash-linear-attention's YOCO model. Raises ValueError for a model it cannot express."""
        swa = self.self_decoder == "sliding_window"
        rope = {"official": "yoco"}  # everything else would be "fla", and must come back as it was
        mixer: dict[str, Any] = {
            "type": "swa" if swa else "gated_retention",
            "num_heads": self.num_self_heads,
            "rope_theta": self.rope_theta,
        }
        if swa:
            mixer |= {"num_v_heads": self.num_self_kv_heads, "window_size": self.window_size}
        else:
            mixer |= {
                "rope_inv_freq": rope.get(self.self_rope, "fla"),
                "gate_logit_normalizer": self.gate_logit_normalizer,
            }
        fields = {
            "architectures": ["YOCOForCausalLM"],
            "model_type": "yoco",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_self_decoder_layers": self.num_self_layers,
            "self_decoder_attn": mixer,
            "cross_decoder_attn": {
                "num_heads": self.num_heads,
                "num_kv_heads": self.num_kv_heads,
                "rope_theta": self.rope_theta,
                "rope_inv_freq": rope.get(self.cross_rope, "fla"),
            },
            "norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
        }
        self._same_model(self.from_fla(fields), "fla", set())
        return fields

    def _same_model(self, other: YOCOConfig, name: str, but: set[str]) -> None:
        """Fails where `other`, this configuration as another code base reads it, is not this one."""
        unused = {"window_size"} if self.self_decoder == "gated_retention" else {"gate_logit_normalizer"}
        mine, theirs = self.to_dict(), other.to_dict()
        lost = [key for key in mine if key not in but | unused and mine[key] != theirs[key]]
        if lost:
            values = ", ".join(f"{key}={mine[key]!r} (it has {theirs[key]!r})" for key in lost)
            raise ValueError(f"{name} has no {values}")
