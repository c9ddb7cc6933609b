"""The operands of `cpu_many_rows` in the order in which its tiles read them, as LLVM code. A unit is 32 bits:
a pair of features in bfloat16, or a feature in float32. For each unit, those of some rows are neighbours."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .cpu_gemv import _load
from .cpu_vectors import LANES, _bfloat16, _float32, _function, _repeated, _rounded, _transposed, _vector

PANEL = LANES // 2  # rows of a weight that are packed together: a tile of them fills the registers
WORD, LONG = ir.IntType(32), ir.IntType(64)


@intrinsic
def pack_rows(_, x, packed, r, width, place, vectors):
    """LANES rows of x (R, K) from r on to packed[place:]: for each of `width` units a vector, which is
    followed by those of the other vectors of the tile. x has pairs, as int32, or numbers that become float32.
    Rows beyond R repeat the last one; units beyond K are 0."""
    stored = x.dtype

    def generate(context, builder, signature, arguments):
        x, packed, r, width, place, vectors = arguments
        array, apart = _array(context, builder, signature.args[0], x), builder.mul(vectors, _number(LANES))
        R, K = cgutils.unpack_tuple(builder, array.shape)
        target = builder.gep(_array(context, builder, signature.args[1], packed).data, [place])
        rows = [_least(builder, builder.add(r, _number(i)), builder.sub(R, _number(1))) for i in range(LANES)]
        rows = [builder.gep(array.data, [builder.mul(row, K)]) for row in rows]
        with cgutils.for_range_slice(builder, _number(0), width, _number(LANES), inc=True) as (k, _):
            first = _least(builder, k, builder.sub(K, _number(LANES)))
            units = [_load(builder, row, first, LANES) for row in rows]
            if stored != types.int32:
                units = [_float32(builder, each, stored, LANES) for each in units]
            units = [builder.bitcast(each, _vector(LANES, WORD)) for each in units]
            units = [_without(builder, each, builder.sub(k, first)) for each in units]
            for i, vector in enumerate(_transposed(builder, units)):
                at = builder.mul(builder.add(k, _number(i)), apart)
                _store(builder, vector, builder.gep(target, [at]))
        return context.get_dummy_value()

    return types.void(x, packed, r, width, place, vectors), generate


@intrinsic
def pack_weights(_, w, groups, n, first, size, packed, t, place):
    """Units first to first + size of PANEL rows of w from n on to packed[t, place:]: for each unit those of
    all rows; units that w lacks are 0. groups: the scales of the groups of 4-bit weights."""
    stored, features = w.dtype, 1 if packed.dtype == types.float32 else 2
    lanes = features * LANES

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
            unit, wide = builder.add(first, p), []
            feature = builder.mul(unit, _number(features))
            for row, scale in zip(rows, scales, strict=True):
                if stored == types.int32:
                    wide.append(_from_codes(builder, row, scale, feature, features))
                    continue
                column = _least(builder, feature, builder.sub(columns, _number(lanes)))
                bits = _load(builder, row, column, lanes)
                bits = (_float32 if features == 1 else _bfloat16)(builder, bits, stored, lanes)
                missing = builder.sub(unit, builder.udiv(column, _number(features)))
                wide.append(_without(builder, builder.bitcast(bits, _vector(LANES, WORD)), missing))
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


def _without(builder, units, count):
    """A vector of units with 0 for the first ones. The last vector of a row is read so that it ends where the
    row ends; its first units are then those of the vector before it."""
    places = ir.Constant(_vector(LANES, LONG), list(range(LANES)))
    new = builder.icmp_signed(">=", places, _repeated(builder, count))
    return builder.select(new, units, ir.Constant(units.type, [0] * LANES))


def _least(builder, first, second):
    return builder.select(builder.icmp_signed("<", first, second), first, second)


def _store(builder, vector, place) -> None:
    builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=1)


def _from_codes(builder, words, scale, feature, features: int):
    """A vector of units of a row of 4-bit weights, from a feature on: (K / 8) words, (K / 32) scales in
    bfloat16. `features` is the number of features of a unit; two are rounded to bfloat16."""
    group = _load(builder, words, builder.shl(builder.lshr(feature, _number(5)), _number(2)), 4)
    group = builder.shuffle_vector(
        group, group, ir.Constant(_vector(LANES, WORD), [i % 4 for i in range(LANES)])
    )
    factor = builder.load(builder.gep(scale, [builder.lshr(feature, _number(5))]))
    factor = builder.bitcast(builder.shl(builder.zext(factor, WORD), ir.Constant(WORD, 16)), ir.FloatType())
    factor = _repeated(builder, factor)
    first = _repeated(builder, builder.and_(builder.trunc(feature, WORD), ir.Constant(WORD, 31)))
    parts = []
    for part in range(features):
        nibbles = ir.Constant(group.type, [4 * ((part * LANES + i) // 4) for i in range(LANES)])
        codes = builder.lshr(group, builder.add(first, nibbles))
        parts.append(builder.fmul(_from_nibbles(builder, codes), factor))
    if features == 1:
        return builder.bitcast(parts[0], group.type)
    order = ir.Constant(_vector(2 * LANES, WORD), list(range(2 * LANES)))
    pairs = builder.shuffle_vector(*(_rounded(builder, each) for each in parts), order)
    return builder.bitcast(pairs, group.type)


def _from_nibbles(builder, codes):
    """q - 8 in float32 of the lowest 4 bits q of each lane."""
    if LANES == 16:
        numbers = ir.Constant(_vector(LANES), [float(q) for q in range(-8, 8)])
        name = "llvm.x86.avx512.permvar.sf.512"  # uses the lowest 4 bits of each index
        return builder.call(
            _function(builder, name, numbers.type, numbers.type, codes.type), [numbers, codes]
        )
    q = builder.and_(codes, ir.Constant(codes.type, [15] * LANES))
    return builder.sitofp(builder.sub(q, ir.Constant(codes.type, [8] * LANES)), _vector(LANES))
