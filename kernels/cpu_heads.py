"""The operands of `cpu_attention` in the order in which its tiles read them, as LLVM code: of some queries or
keys, the pairs of two features are neighbours; of some features of the values, the pairs of two keys."""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .cpu_gemv import _load
from .cpu_panels import LONG, PANEL, WORD, _address, _least, _number, _store
from .cpu_vectors import LANES, _function, _repeated, _transposed, _vector

SHORT = ir.IntType(16)


@njit
def rows_of(place, head, K, count):
    """The rows of a head, as `_row` takes them. place: the address of the first row, and the bytes between
    batches, heads and rows."""
    return place[0] + head // K * place[1] + head % K * place[2], place[3], count


@intrinsic
def pack(_, rows, first, width, packed, t, place, apart, count):
    """len(count) rows of `width` pairs of features, from `first` on, to packed[t, place:]. The pairs of two
    features are `apart` numbers apart. Pairs beyond the width are 0. rows: see `_row`."""

    def generate(context, builder, signature, arguments):
        rows, first, width, _, t, place, apart, _ = arguments
        target = _address(context, builder, signature, arguments, 3, t, place)
        kind, flags = _vector(LANES, WORD), _vector(LANES, ir.IntType(1))
        load = _function(
            builder, f"llvm.masked.load.v{LANES}i32.p0", kind, kind.as_pointer(), WORD, flags, kind
        )
        align, zero = ir.Constant(WORD, 1), ir.Constant(kind, [0] * LANES)
        places = ir.Constant(_vector(LANES, LONG), list(range(LANES)))
        starts = [_row(builder, rows, builder.add(first, _number(i)), WORD) for i in range(count.count)]
        with cgutils.for_range_slice(builder, _number(0), width, _number(LANES), inc=True) as (k, _):
            inside, pairs = builder.icmp_signed("<", places, _repeated(builder, builder.sub(width, k))), []
            for start in starts:
                at = builder.bitcast(builder.gep(start, [k]), kind.as_pointer())
                pairs.append(builder.call(load, [at, align, inside, zero]))
            for i, vector in enumerate(_transposed(builder, pairs)):
                at = builder.add(k, _number(i * (LANES // count.count)))
                _store(builder, vector, builder.gep(target, [builder.mul(at, apart)]))
        return context.get_dummy_value()

    return types.void(rows, first, width, packed, t, place, apart, count), generate


@intrinsic
def pack_values(_, rows, s, d, packed, place):
    """The pairs of keys s and s + 1 of PANEL features from d on to packed[0, place:]. A key that does not
    exist has the value 0. rows: see `_row`."""

    def generate(context, builder, signature, arguments):
        rows, s, d, _, place = arguments
        target = _address(context, builder, signature, arguments, 3, _number(0), place)
        following, kind = builder.add(s, _number(1)), _vector(PANEL, SHORT)
        first, second = (_load(builder, _row(builder, rows, row, SHORT), d, PANEL) for row in (s, following))
        exists = builder.icmp_signed("<", following, cgutils.unpack_tuple(builder, rows)[2])
        second = builder.select(exists, second, ir.Constant(kind, [0] * PANEL))
        order = [i + PANEL * side for i in range(PANEL) for side in (0, 1)]
        pairs = builder.shuffle_vector(first, second, ir.Constant(_vector(2 * PANEL, WORD), order))
        _store(builder, pairs, target)
        return context.get_dummy_value()

    return types.void(rows, s, d, packed, place), generate


def _row(builder, rows, i, element: ir.Type):
    """The address of row i; beyond the last row, that of the last row. rows: the address of the first one,
    the bytes from one to the next, and their number."""
    start, apart, count = cgutils.unpack_tuple(builder, rows)
    i = _least(builder, i, builder.sub(count, _number(1)))
    return builder.inttoptr(builder.add(start, builder.mul(i, apart)), element.as_pointer())
