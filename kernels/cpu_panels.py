"""The operands of `cpu_many_rows` in the order in which its tiles read them, as LLVM code: for each pair of
features, those of some rows are neighbours."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .cpu_gemv import _load
from .cpu_vectors import LANES, _bfloat16, _function, _repeated, _rounded, _transposed, _vector

PANEL = 8  # rows of a weight that are packed together
WORD, LONG = ir.IntType(32), ir.IntType(64)


@intrinsic
def pack_rows(_, x, packed, r, width, place, vectors):
    """LANES rows of x (R, K) pairs from r on to packed[place:]: for each of `width` pairs a vector, which is
    followed by those of the other vectors of the tile. Rows beyond R repeat the last one; pairs beyond K are
    0."""

    def generate(context, builder, signature, arguments):
        x, packed, r, width, place, vectors = arguments
        array, apart = _array(context, builder, signature.args[0], x), builder.mul(vectors, _number(LANES))
        R, K = cgutils.unpack_tuple(builder, array.shape)
        target = builder.gep(_array(context, builder, signature.args[1], packed).data, [place])
        rows = [_least(builder, builder.add(r, _number(i)), builder.sub(R, _number(1))) for i in range(LANES)]
        rows = [builder.gep(array.data, [builder.mul(row, K)]) for row in rows]
        with cgutils.for_range_slice(builder, _number(0), width, _number(LANES), inc=True) as (k, _):
            first = _least(builder, k, builder.sub(K, _number(LANES)))
            pairs = [_load(builder, row, first, LANES) for row in rows]
            pairs = [_without(builder, each, builder.sub(k, first)) for each in pairs]
            for i, vector in enumerate(_transposed(builder, pairs)):
                at = builder.mul(builder.add(k, _number(i)), apart)
                _store(builder, vector, builder.gep(target, [at]))
        return context.get_dummy_value()

    return types.void(x, packed, r, width, place, vectors), generate


@intrinsic
def pack_weights(_, w, groups, n, first, size, packed, t, place):
    """Pairs first to first + size of PANEL rows of w from n on to packed[t, place:], in bfloat16: for each
    pair of features those of all rows; pairs that w lacks are 0. groups: the scales of the groups of 4-bit
    weights."""
    stored = w.dtype

    def generate(context, builder, signature, arguments):
        def rows_of(kind, value):
            array = _array(context, builder, kind, value)
            columns = cgutils.unpack_tuple(builder, array.shape)[1]
            rows = [builder.add(n, _number(i)) for i in range(PANEL)]
            return [builder.gep(array.data, [builder.mul(row, columns)]) for row in rows], columns

        w, groups, n, first, size, _, t, place = arguments
        kinds = signature.args
        target = _address(context, builder, signature, arguments, 5, t, place)
        (rows, columns), (scales, _) = rows_of(kinds[0], w), rows_of(kinds[1], groups)
        with cgutils.for_range_slice(builder, _number(0), size, _number(LANES), inc=True) as (p, _):
            pair, wide = builder.add(first, p), []
            for row, scale in zip(rows, scales, strict=True):
                if stored == types.int32:
                    codes = _load(builder, row, builder.lshr(pair, _number(2)), 4)
                    factor = builder.load(builder.gep(scale, [builder.lshr(pair, _number(4))]))
                    wide.append(_from_codes(builder, codes, factor))
                else:
                    column = _least(
                        builder, builder.shl(pair, _number(1)), builder.sub(columns, _number(2 * LANES))
                    )
                    bits = _load(builder, row, column, 2 * LANES)
                    bits = _bfloat16(builder, bits, stored, 2 * LANES)
                    missing = builder.sub(pair, builder.lshr(column, _number(1)))
                    wide.append(_without(builder, builder.bitcast(bits, _vector(LANES, WORD)), missing))
            wide = [builder.bitcast(each, _vector(LANES, WORD)) for each in wide]
            for i, vector in enumerate(_transposed(builder, wide)):
                at = builder.add(builder.mul(p, _number(PANEL)), _number(i * LANES))
                _store(builder, vector, builder.gep(target, [at]))
        return context.get_dummy_value()

    return types.void(w, groups, n, first, size, packed, t, place), generate


def _number(value: int):
    return ir.Constant(LONG, value)


def _array(context, builder, kind, value):
    return context.make_array(kind)(context, builder, value)


def _address(context, builder, signature, arguments, i: int, row, place):
    """Where the array of argument i has the number `place` of a row."""
    array = _array(context, builder, signature.args[i], arguments[i])
    length = cgutils.unpack_tuple(builder, array.shape)[-1]
    return builder.gep(array.data, [builder.add(builder.mul(row, length), place)])


def _without(builder, pairs, count):
    """A vector of pairs with 0 for the first ones. The last vector of a row is read so that it ends where the
    row ends; its first pairs are then those of the vector before it."""
    places = ir.Constant(_vector(LANES, LONG), list(range(LANES)))
    new = builder.icmp_signed(">=", places, _repeated(builder, count))
    return builder.select(new, pairs, ir.Constant(pairs.type, [0] * LANES))


def _least(builder, first, second):
    return builder.select(builder.icmp_signed("<", first, second), first, second)


def _store(builder, vector, place) -> None:
    builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=1)


def _from_codes(builder, words, scale):
    """The numbers of a group in bfloat16: 4 words, and a scale in bfloat16."""
    numbers = ir.Constant(_vector(LANES), [float(q) for q in range(-8, 8)])
    wide = ir.Constant(_vector(LANES, WORD), [i % 4 for i in range(LANES)])
    words = builder.shuffle_vector(words, words, wide)
    factor = builder.bitcast(builder.shl(builder.zext(scale, WORD), ir.Constant(WORD, 16)), ir.FloatType())
    factor, halves = _repeated(builder, factor), []
    look_up = _function(
        builder, "llvm.x86.avx512.permvar.sf.512", numbers.type, numbers.type, words.type
    )  # uses the lowest 4 bits of each index
    for first in (0, 4):
        shift = ir.Constant(words.type, [4 * (first + i // 4) for i in range(LANES)])
        codes = builder.call(look_up, [numbers, builder.lshr(words, shift)])
        halves.append(_rounded(builder, builder.fmul(codes, factor)))
    return builder.shuffle_vector(*halves, ir.Constant(_vector(2 * LANES, WORD), list(range(2 * LANES))))
