"""Products that sum over named axes: einsum, matmul, attention of a row within itself.

Every axis of every factor gets a letter. A band axis whose letter the product keeps is sliced in all factors
that have it; the others are used whole. Where it is summed over, every row is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rowtune.graph.rules.rule import WHOLE, Opaque, Question, Read, RowRule
from rowtune.rows import pointwise as same_rows

Letters = Sequence[str]


def _product(q: Question, factors: list[tuple[str, Letters]], kept: Letters) -> RowRule | Opaque:
    """The rule, given each factor's letters and the product's."""
    banded = {letters[d] for name, letters in factors if (d := q.dims[name]) is not None}
    if len(banded) != 1:
        return Opaque(f"the factors of {q.node.op} are banded along different axes")
    letter = banded.pop()
    if letter not in kept:
        return Opaque(f"{q.node.op} sums over the band axis")
    dim = list(kept).index(letter)
    reads: dict[str, Read] = dict.fromkeys(q.node.inputs, WHOLE)
    for name, letters in factors:
        at = [d for d, found in enumerate(letters) if found == letter]
        if not at or q.shape(name)[at[0]] != q.out[dim]:
            read = WHOLE  # without the axis, or one entry for all rows
        else:
            read = Read(at[0], same_rows(q.out[dim]))
        if len(at) > 1 or (read == WHOLE and q.dims[name] is not None):
            return Opaque(f"{q.node.op} takes a diagonal of the band axis")
        if reads[name] not in (WHOLE, read):
            return Opaque(f"{q.node.op} of a feature map with itself, along two axes")
        reads[name] = read
    if any(q.dims[name] is not None and read == WHOLE for name, read in reads.items()):
        return Opaque(f"{q.node.op} needs a feature map whole")
    return RowRule(dim, reads)


def einsum(q: Question) -> RowRule | Opaque:
    """einsum that keeps the band axis (not summed over, no diagonal); factors without it are used whole."""
    names = [r.name for r in q.node.args[1]]
    left, arrow, right = str(q.node.args[0]).replace(" ", "").partition("->")
    terms = [_letters(term, len(q.shape(n))) for term, n in zip(left.split(","), names, strict=True)]
    if arrow:
        kept = _letters(right, len(q.out))
    else:  # in alphabetical order what appears once, after what "..." stands for
        flat = [letter for term in terms for letter in term]
        dots = [letter for letter in dict.fromkeys(flat) if letter.startswith(".")]
        dots.sort(key=lambda letter: -int(letter[1:]))
        once = sorted(letter for letter in flat if not letter.startswith(".") and flat.count(letter) == 1)
        kept = [*dots, *once]
    return _product(q, list(zip(names, terms, strict=True)), kept)


def _letters(term: str, rank: int) -> list[str]:
    """ "a...b" of rank 4 is a, .2, .1, b: the dots' axes are counted from their right."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after)
    return [*before, *(f".{i}" for i in range(hidden, 0, -1)), *after] if dots else list(before)


def matmul(q: Question) -> RowRule | Opaque:
    """matmul, mm, bmm: rows are any axis but the one summed over; batch axes are aligned from the right."""
    x, y = (a.name for a in q.node.args[:2])
    left, right = _matrix(len(q.shape(x)), "i", "k"), _matrix(len(q.shape(y)), "k", "j")
    if len(right) == 1:
        right = ["k"]
    batch = _dots(max(len(left), len(right)) - 2)
    kept = [*batch, *left[-2:-1], *(["j"] if len(right) > 1 else [])]
    return _product(q, [(x, left), (y, right)], kept)


def _dots(count: int) -> list[str]:
    return [f".{i}" for i in range(count, 0, -1)]


def _matrix(rank: int, row: str, column: str) -> list[str]:
    """Letters of a stack of matrices; a vector has the column's."""
    return [*_dots(rank - 2), row, column] if rank > 1 else [column]


def tensordot(q: Question) -> RowRule | Opaque:
    """tensordot over other axes than the band's."""
    (x, y), (first, second) = (a.name for a in q.node.args[:2]), q.node.args[2:4]
    left = [f"x{d}" for d in range(len(q.shape(x)))]
    right = [f"y{d}" for d in range(len(q.shape(y)))]
    summed = [left[d] for d in first]
    for d, letter in zip(second, summed, strict=True):
        right[d] = letter
    kept = [letter for letter in (*left, *right) if letter not in summed]
    return _product(q, [(x, left), (y, right)], kept)


def attention(q: Question) -> RowRule | Opaque:
    """Attention of each row within itself, or of banded queries over whole keys and values."""
    names = [a.name for a in q.node.args[:3]]
    ranks = [len(q.shape(n)) for n in names]
    ends = (("l", "e"), ("s", "e"), ("s", "f"))
    factors: list[tuple[str, Letters]] = [
        (name, _matrix(rank, *end)) for name, rank, end in zip(names, ranks, ends, strict=True)
    ]
    mask = q.arg(3, "attn_mask", None)
    if mask is not None:
        factors.append((mask.name, _matrix(len(q.shape(mask.name)), "l", "s")))
    kept = [*_dots(max(ranks) - 2), "l", "f"]
    rule = _product(q, factors, kept)
    if isinstance(rule, RowRule) and kept[rule.dim or 0] == "l" and q.arg(5, "is_causal", False):
        return Opaque("causal attention counts rows from the first")
    return rule


CONTRACTIONS: dict[str, Callable[[Question], RowRule | Opaque]] = {
    "einsum": einsum,
    "matmul": matmul,
    "mm": matmul,
    "bmm": matmul,
    "tensordot": tensordot,
    "scaled_dot_product_attention": attention,
}
