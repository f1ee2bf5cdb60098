"""The graph of Phi3ForCausalLM for ONNX Runtime GenAI, node for node as its own builder (0.18) makes it for the CPU.

    tokens → embedding → blocks of (norm → qkv → GroupQueryAttention → o → norm → gate, up → silu(gate)·up → down)
           → norm → head

Norms but the first take the residual stream and what is to be added to it, and give both the sum and its norm
(SkipSimplifiedLayerNormalization). GroupQueryAttention takes q, k and v in one tensor, turns q and k by the caches
``cos_cache`` and ``sin_cache`` (as many channels as these have; the rest pass through), and keeps the KV cache.
longrope has two pairs of caches; a total length beyond the original context takes the long one, by an If whose
branches hold the caches as constants.

What differs from the builder's graph: embedding and head may be 8-bit tables with GGUF's Q8_0 codes, where a tied one
is two initializers over the same bytes of the data file (the builder reshapes in the graph, which ONNX Runtime folds
into a copy); in float16 they are widened after reading, as activations are float32.
"""

from __future__ import annotations

__all__ = ["OPERATORS", "build_model"]

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phi4edge import __version__
from phi4edge.checkpoint.config import ModelConfig
from phi4edge.model.rope import rotary_table
from phi4edge.quant.scheme import GGML_SCHEMES, Scheme
from phi4edge.writers._onnx_names import DATA, EMBEDDING, HEAD, norm_name, part_name, parts
from phi4edge.writers._onnx_tensors import Place, table_names

if TYPE_CHECKING:
    from onnx import ModelProto

OPERATORS = "com.microsoft"
OPSET, IR_VERSION = 22, 10  # the builder's
_TYPES = {"F32": 1, "F16": 10, "U8": 2}  # TensorProto.DataType
_FLOAT, _INT32, _INT64 = 1, 6, 7
_MASK = "/model/attn_mask_reformat/attn_mask_subgraph"


def build_model(
    config: ModelConfig,
    schemes: Mapping[str, Scheme],
    tables: Mapping[str, str],
    places: Mapping[str, Place],
    accuracy_level: int,
    metadata: Mapping[str, str],
) -> ModelProto:
    """The model whose weights lie at ``places`` in the data file beside it.

    ``schemes`` of every linear of the blocks by checkpoint name; ``tables`` are the types of "head" and "embedding".
    """
    import onnx

    graph = _Graph(config, accuracy_level, places)
    graph.lengths()
    residual = graph.embedding(tables["head" if config.tie_word_embeddings else "embedding"])
    added: str | None = None
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        hidden, residual = graph.norm(f"{at}input_layernorm.weight", residual, added)
        (qkv,) = graph.linear(f"{at}self_attn.qkv_proj", schemes, hidden)
        (attended,) = graph.linear(f"{at}self_attn.o_proj", schemes, graph.attention(layer, qkv))
        hidden, residual = graph.norm(f"{at}post_attention_layernorm.weight", residual, attended)
        gate, up = graph.linear(f"{at}mlp.gate_up_proj", schemes, hidden)
        (added,) = graph.linear(f"{at}mlp.down_proj", schemes, graph.gated(layer, gate, up))
    hidden, _ = graph.norm("model.norm.weight", residual, added, last=True)
    graph.head(tables["head"], hidden)
    model = onnx.helper.make_model(
        graph.proto(),
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(OPERATORS, 1)],
        ir_version=IR_VERSION,
        producer_name="phi4edge",
        producer_version=__version__,
    )
    onnx.helper.set_model_props(model, dict(metadata))
    return model


class _Graph:
    """A graph in the making; methods add nodes and return the names of what they give."""

    def __init__(self, config: ModelConfig, accuracy_level: int, places: Mapping[str, Place]) -> None:
        import onnx

        self._config, self._accuracy, self._places = config, accuracy_level, places
        self._helper = onnx.helper
        self._nodes: list[Any] = []
        self._initializers = [self._external(name, place) for name, place in places.items()]
        self._inputs = [self._value("input_ids", _INT64, "batch_size", "sequence_length")]
        self._inputs.append(self._value("attention_mask", _INT64, "batch_size", "total_sequence_length"))
        self._outputs = [self._value("logits", _FLOAT, "batch_size", "sequence_length", config.vocab_size)]

    def proto(self) -> Any:
        """The finished graph."""
        return self._helper.make_graph(self._nodes, "main_graph", self._inputs, self._outputs, self._initializers)

    def lengths(self) -> None:
        """Tokens in the cache and in all, as GroupQueryAttention wants them, and the caches of the rotation."""
        one, index = self._constant("one", [1]), self._constant("axis", 1)
        total = f"{_MASK}/Gather/output_0"
        self._node("Shape", ["attention_mask"], [f"{_MASK}/Shape/output_0"])
        self._node("Gather", [f"{_MASK}/Shape/output_0", index], [total], axis=0)
        self._node("ReduceSum", ["attention_mask", one], [f"{_MASK}/ReduceSum/output_0"], keepdims=0)
        self._node("Sub", [f"{_MASK}/ReduceSum/output_0", one], [f"{_MASK}/Sub/output_0"])
        self._node("Cast", [f"{_MASK}/Sub/output_0"], [f"{_MASK}/Sub/Cast/output_0"], to=_INT32)
        self._node("Cast", [total], [f"{_MASK}/Gather/Cast/output_0"], to=_INT32)
        if self._config.rope.is_longrope:
            self._longrope(total)

    def _longrope(self, total: str) -> None:
        rope, context = self._config.rope, self._config.context_length
        assert rope.original_context is not None
        short, base = min(rope.original_context, context), "/model/rope_caches_subgraph"
        self._node("Greater", [total, self._constant("original_context", short)], [f"{base}/Greater/output_0"])
        # A table of one position more than the original context is one of the long factors.
        branches = {"then_branch": ("large", max(context, short + 1)), "else_branch": ("small", short)}
        graphs = {name: self._caches(*branch) for name, branch in branches.items()}
        self._node("If", [f"{base}/Greater/output_0"], ["cos_cache", "sin_cache"], **graphs)

    def _caches(self, size: str, length: int) -> Any:
        """A branch without inputs that gives cos and sin of ``length`` positions."""
        import onnx

        table, half = rotary_table(self._config.rope, length), self._config.rope.dim // 2
        nodes, outputs = [], []
        for field in ("cos", "sin"):
            name, values = f"{field}_cache_{size}", getattr(table, field)[:, :half].contiguous().numpy()
            nodes.append(
                self._helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(values, name))
            )
            outputs.append(self._value(name, _FLOAT, *values.shape))
        return self._helper.make_graph(nodes, f"{size}_rotemb_caches_graph", [], outputs)

    def embedding(self, kind: str) -> str:
        """The rows of the tokens, float32."""
        out, base = "/model/embed_tokens/Gather/output_0", "/model/embed_tokens"
        role = HEAD if self._config.tie_word_embeddings else EMBEDDING
        stored = table_names(role, kind)
        if kind == "q8_0":
            rows, groups, block = self._places[stored[0]].shape
            flat = {"qweight": (rows, groups * block), "scales": (rows, groups)}
            names = [
                self._seen_as(name, f"{EMBEDDING}.table.{f}", flat[f]) for name, f in zip(stored, flat, strict=True)
            ]
            self._node(
                "GatherBlockQuantized",
                [names[0], "input_ids", names[1]],
                [out],
                domain=OPERATORS,
                bits=8,
                block_size=block,
                gather_axis=0,
                quantize_axis=1,
            )
            return out
        self._node("Gather", [stored[0], "input_ids"], [f"{base}/Gather/half"])
        self._node("Cast", [f"{base}/Gather/half"], [out], to=_FLOAT)
        return out

    def head(self, kind: str, hidden: str) -> None:
        """The logits of every position."""
        stored = table_names(HEAD, kind)
        rows, columns = self._config.vocab_size, self._config.hidden_size
        if kind == "q8_0":
            self._matmul("/lm_head/MatMulNBits", [hidden, *stored], "logits", GGML_SCHEMES[kind], rows, columns)
            return
        self._node("Cast", [stored[0]], ["/lm_head/Cast/output_0"], to=_FLOAT)  # folded when the model is loaded
        self._node("FusedMatMul", [hidden, "/lm_head/Cast/output_0"], ["logits"], domain=OPERATORS, transB=1)

    def norm(self, name: str, residual: str, added: str | None, *, last: bool = False) -> tuple[str, str]:
        """The norm of ``residual`` and what is ``added`` to it, and their sum."""
        gain = norm_name(name, self._config)
        base = _scope(gain.removesuffix(".weight"))
        out, epsilon = f"{base}/output_0", self._config.rms_norm_eps
        if added is None:
            self._node("SimplifiedLayerNormalization", [residual, gain], [out], epsilon=epsilon, axis=-1, stash_type=1)
            return out, residual
        total = f"{base}/output_3"
        self._node(
            "SkipSimplifiedLayerNormalization",
            [residual, added, gain],
            [out] if last else [out, "", "", total],
            domain=OPERATORS,
            epsilon=epsilon,
        )
        return out, total

    def linear(self, linear: str, schemes: Mapping[str, Scheme], hidden: str) -> list[str]:
        """What the parts of a block's linear make of ``hidden``."""
        out_features, in_features = self._config.linear_shapes[linear.split(".", 3)[3]]
        scheme, found = schemes[linear], []
        for part, start, stop in parts(linear, out_features):
            base = f"{_scope(part)}/MatMulNBits"
            fields = ("qweight", "scales") if scheme.symmetric else ("qweight", "scales", "zeros")
            stored = [part_name(part, field) for field in fields]
            self._matmul(base, [hidden, *stored], f"{base}/output_0", scheme, stop - start, in_features)
            found.append(f"{base}/output_0")
        return found

    def _matmul(self, name: str, inputs: list[str], out: str, scheme: Scheme, rows: int, columns: int) -> None:
        block = scheme.group_size if scheme.group_size > 0 else columns
        sizes = {"K": columns, "N": rows, "bits": scheme.bits, "block_size": block}
        self._node("MatMulNBits", inputs, [out], name=name, domain=OPERATORS, **sizes, accuracy_level=self._accuracy)

    def attention(self, layer: int, qkv: str) -> str:
        """Attention over the cache and ``qkv``, whose rotation it does."""
        config, base = self._config, f"/model/layers.{layer}/attn/GroupQueryAttention"
        cache = ("batch_size", config.num_kv_heads, "past_sequence_length", config.head_dim)
        grown = ("batch_size", config.num_kv_heads, "total_sequence_length", config.head_dim)
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        self._inputs += [self._value(name, _FLOAT, *cache) for name in past]
        self._outputs += [self._value(name, _FLOAT, *grown) for name in present]
        lengths = [f"{_MASK}/Sub/Cast/output_0", f"{_MASK}/Gather/Cast/output_0"]
        self._node(
            "GroupQueryAttention",
            [qkv, "", "", *past, *lengths, "cos_cache", "sin_cache"],
            [f"{base}/output_0", *present],
            domain=OPERATORS,
            num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            scale=config.head_dim**-0.5,
            local_window_size=-1,
            softcap=0.0,
            do_rotary=1,
            rotary_interleaved=0,
        )
        return f"{base}/output_0"

    def gated(self, layer: int, gate: str, up: str) -> str:
        """silu(gate) · up."""
        base = f"/model/layers.{layer}/mlp"
        self._node("Sigmoid", [gate], [f"{base}/act_fn/Sigmoid/output_0"])
        self._node("Mul", [gate, f"{base}/act_fn/Sigmoid/output_0"], [f"{base}/act_fn/Mul/output_0"])
        self._node("Mul", [f"{base}/act_fn/Mul/output_0", up], [f"{base}/Mul/output_0"])
        return f"{base}/Mul/output_0"

    def _node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        name = attributes.pop("name", outputs[0].removesuffix("/output_0"))
        self._nodes.append(self._helper.make_node(kind, inputs, outputs, name=name, **attributes))

    def _constant(self, name: str, values: int | list[int]) -> str:
        whole = f"/model/constants/INT64/{name}"
        flat = values if isinstance(values, list) else [values]
        tensor = self._helper.make_tensor(whole, _INT64, [len(flat)] if isinstance(values, list) else [], flat)
        self._nodes.append(self._helper.make_node("Constant", [], [whole], name=f"{whole}/Constant", value=tensor))
        return whole

    def _value(self, name: str, kind: int, *shape: str | int) -> Any:
        return self._helper.make_tensor_value_info(name, kind, list(shape))

    def _seen_as(self, name: str, alias: str, shape: tuple[int, ...]) -> str:
        """A second initializer over the bytes of ``name``, in another shape."""
        self._initializers.append(self._external(alias, replace(self._places[name], shape=shape)))
        return alias

    def _external(self, name: str, place: Place) -> Any:
        import onnx

        tensor = onnx.TensorProto(name=name, data_type=_TYPES[place.dtype], dims=place.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", place.offset), ("length", place.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def _scope(name: str) -> str:
    """``model.layers.0.attn.o_proj`` as the builder names nodes: ``/model/layers.0/attn/o_proj``."""
    model, layers, number, rest = name.split(".", 3)
    return f"/{model}/{layers}.{number}/{rest.replace('.', '/')}"
