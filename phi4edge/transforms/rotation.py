"""Rotations folded into the weights: outliers are spread over all channels before anything is rounded.

Sources: "QuaRot", arXiv 2404.00456, section 4, and "SpinQuant", arXiv 2405.16406, section 3.1, whose R1 and R2 these
are. RMSNorm without its gain commutes with any orthogonal Q, ‖xQ‖ = ‖x‖, so with gains folded into the columns behind
them the residual stream x becomes xQ:

    R1   embedding E Q, readers (W·diag γ) Q, writers Qᵀ W, head (W·diag γ) Q, all gains 1
    R2   for each key-value head, value rows Rᵀ W_v and the columns of o_proj that read them, W_o R

and no runtime needs to know. A tied head has no matrix of its own to fold the final norm's gain into; R1 would have to
untie it, which adds a second embedding to the artifact, so it is refused, and R2 alone is offered.

Q = diag(±1)·(A ⊗ B), never formed: A holds what keeps the size from being a power of two, as a Hadamard matrix
of Paley's first kind where there is one (12 of 3072, 20 of 5120, 72 of 576), else as any orthogonal matrix. Signs are
bits of SHAKE-256, so that a run's rotation is the same wherever and with whatever library it is exported.
"""

from __future__ import annotations

__all__ = ["Orthogonal", "Rotated", "foldable", "orthogonal", "rotated"]

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from phi4edge.checkpoint.config import ModelConfig
from phi4edge.core.errors import InputError
from phi4edge.core.recipe import FLOAT32
from phi4edge.model.compute import computing
from phi4edge.model.source import WeightSource
from phi4edge.model.topology import RESIDUAL_READERS, RESIDUAL_WRITERS, value_rows


@dataclass(frozen=True)
class Orthogonal:
    """x ↦ xQ over the last axis."""

    signs: Tensor  # [n] float32, or [..., n] for one Q each along other axes
    left: Tensor  # [p, p] float32, orthogonal
    right: Tensor  # [n/p, n/p] float32, orthogonal

    def __call__(self, x: Tensor) -> Tensor:
        """xQ for ``x`` [..., n] float32; never on bfloat16 units: a weight is the same wherever it is asked for."""
        signed = (x * self.signs).reshape(*x.shape[:-1], self.left.shape[0], self.right.shape[0])
        with computing(FLOAT32):
            turned: Tensor = self.left.T @ signed @ self.right
        return turned.reshape(x.shape)


def orthogonal(shape: tuple[int, ...], label: str) -> Orthogonal:
    """An orthogonal matrix of size n = ``shape[-1]`` for each index of the other axes; ``label`` decides the signs."""
    size = shape[-1]
    odd, twos = size, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    core = _core(odd, twos, label)
    twos = (size // core.shape[0]).bit_length() - 1
    towards_left = min(twos, max(0, round(math.log2(math.sqrt(size) / core.shape[0]))))  # two factors of about one size
    left, right = torch.kron(core, _sylvester(towards_left)), _sylvester(twos - towards_left)
    return Orthogonal(_signs(shape, label), _normalised(left), _normalised(right))


def _normalised(matrix: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(matrix[0])
    return matrix / length


def _sylvester(twos: int) -> Tensor:
    """The Hadamard matrix of order 2^twos."""
    whole = torch.ones(1, 1)
    for _ in range(twos):
        whole = torch.kron(whole, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return whole


def _core(odd: int, twos: int, label: str) -> Tensor:
    """What Sylvester's doubling starts from: order 1, or odd·2^j by Paley with the least j ≤ twos, or any of odd."""
    if odd == 1:
        return torch.ones(1, 1)
    for order in (odd * 2**j for j in range(2, twos + 1)):
        if _is_prime(order - 1):
            return _paley(order - 1)
    entries = _random(odd * odd, f"{label}/core").double().reshape(odd, odd) / 2**63  # in −1 … 1
    q: Tensor = torch.linalg.qr(entries)[0]
    return q.float()


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _paley(prime: int) -> Tensor:
    """The Hadamard matrix of order prime + 1, prime ≡ 3 mod 4: I + S, S = [[0, 1], [−1, χ(i − j)]] (Paley 1933)."""
    squares = {i * i % prime for i in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)])
    index = torch.arange(prime)
    matrix = torch.eye(prime + 1)
    matrix[0, 1:] += 1
    matrix[1:, 0] -= 1
    matrix[1:, 1:] += character[(index[:, None] - index[None, :]) % prime]
    return matrix


def _random(count: int, label: str) -> Tensor:
    """``count`` whole numbers of 64 bits, [count] int64."""
    return torch.frombuffer(bytearray(hashlib.shake_256(label.encode()).digest(8 * count)), dtype=torch.int64)


def _signs(shape: tuple[int, ...], label: str) -> Tensor:
    return 1.0 - 2.0 * (_random(math.prod(shape), f"{label}/signs") & 1).float().reshape(shape)


_FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True)
class Rotated:
    """A source of weights whose residual stream, or whose value heads, are rotated; same shapes, same function."""

    source: WeightSource
    rotation: str  # one of phi4edge.core.recipe.ROTATIONS, not "none" or "auto"
    seed: int

    @property
    def config(self) -> ModelConfig:
        """The model's shapes."""
        return self.source.config

    @cached_property
    def residual(self) -> Orthogonal | None:
        """Q of the residual stream, or None where it stays as it is."""
        if "residual" not in self.rotation:
            return None
        return orthogonal((self.config.hidden_size,), f"{self.seed}/residual")

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """Tensor ``name`` (or rows of it), float32; a block's linears are computed whole, their rows mix."""
        residual, parts = self.residual, name.split(".", 3)
        if parts[1] == "layers" and parts[3].removesuffix(".weight") in {*RESIDUAL_READERS, *RESIDUAL_WRITERS}:
            whole = self._linear(int(parts[2]), parts[3].removesuffix(".weight"))
            return whole if rows is None else whole[rows]
        if residual is None:
            return self.source.tensor(name, rows)
        if name.endswith("norm.weight"):
            return torch.ones_like(self.source.tensor(name, rows))
        matrix = self.source.tensor(name, rows)
        return residual(matrix if name == "model.embed_tokens.weight" else matrix * self.source.tensor(_FINAL_NORM))

    def _linear(self, layer: int, name: str) -> Tensor:
        residual, prefix = self.residual, f"model.layers.{layer}."
        W = self.source.tensor(f"{prefix}{name}.weight")
        if residual is not None and name in RESIDUAL_READERS:
            W = residual(W * self.source.tensor(f"{prefix}{RESIDUAL_READERS[name]}.weight"))
        if residual is not None and name in RESIDUAL_WRITERS:
            W = residual(W.T).T.contiguous()
        if "heads" in self.rotation and name.startswith("self_attn."):
            W = self._heads(layer, name, W)
        return W

    def _heads(self, layer: int, name: str, W: Tensor) -> Tensor:
        """The value rows, or o_proj's columns, of each key-value head in its own basis."""
        c = self.config
        turn = orthogonal((c.num_kv_heads, 1, c.head_dim), f"{self.seed}/heads/{layer}")
        if name == "self_attn.o_proj":
            return turn(W.reshape(W.shape[0], c.num_kv_heads, -1, c.head_dim)).reshape(W.shape)
        values = W[value_rows(c)].T.reshape(W.shape[1], c.num_kv_heads, 1, c.head_dim)
        turned = W.clone()
        turned[value_rows(c)] = turn(values).reshape(W.shape[1], -1).T
        return turned


def foldable(rotation: str, config: ModelConfig) -> str:
    """``rotation`` with "auto" decided for a model: both where the head is a matrix of its own, else none."""
    if rotation != "auto":
        return rotation
    return "none" if config.tie_word_embeddings else "residual+heads"


def rotated(source: WeightSource, rotation: str, seed: int) -> WeightSource:
    """``source`` with the rotations that ``rotation`` names folded in; "none" is ``source`` itself.

    Raises:
        InputError: the residual stream of a model with a tied head was to be rotated.
    """
    if rotation == "none":
        return source
    config = source.config
    if "residual" in rotation and config.tie_word_embeddings:
        size = config.vocab_size * config.hidden_size
        raise InputError(
            f"the residual stream cannot be rotated: the head is tied to the embedding ({size:,} weights), and the "
            "final norm's gain can be folded into one of them only",
            "--rotation heads needs no gain folded; or untie the head in the checkpoint, at the price of its bytes",
        )
    return Rotated(source, rotation, seed)
